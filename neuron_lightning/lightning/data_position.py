"""Where a run is in its data: what a checkpoint notes of it, and loaders that go on from there.

A map-style loader is continued where its samples are chosen: the batches that are trained on are skipped unread, in
the order that the epoch began with, under any number of workers. A loader with torchdata's ``state_dict`` protocol is
asked for its own state. For what has neither, an exact resume is not possible, and saying so is an error.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, SequentialSampler

from neuron_lightning.errors import DataError


def is_stateful(loader: Any) -> bool:
    """Whether a loader has torchdata's protocol."""
    return callable(getattr(loader, "state_dict", None)) and callable(
        getattr(loader, "load_state_dict", None)
    )


def is_map_style(loader: Any) -> bool:
    """Whether samples can be chosen by number."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def place(loader: DataLoader[Any]) -> PlacedSampler:
    """Puts a sampler into a map-style loader that knows its place; the one that is there already, if any."""
    name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
    inner = getattr(loader, name)
    if isinstance(inner, PlacedSampler):
        return inner
    placed = PlacedSampler(inner)
    # DataLoader refuses assignment after construction, although it reads these attributes at every iter().
    object.__setattr__(loader, name, placed)
    return placed


def refuse(loader: Any, done: int) -> DataError:
    """What to say of a loader that cannot go on in the middle of an epoch."""
    kind = type(getattr(loader, "dataset", loader)).__name__
    return DataError(
        f"the checkpoint was written after {done} batch(es) of the epoch, but {kind} cannot be continued there: it is "
        "iterable and has no state. Use torchdata's StatefulDataLoader (or give the loader state_dict() and "
        "load_state_dict()), use a map-style dataset, resume from a checkpoint of the end of an epoch, or let the epoch "
        "start over with NeuronXLAStrategy(resume_override=['data'])."
    )


class PlacedSampler(Sampler[Any]):
    """``inner``, which may start behind its first items, and whose order of the present epoch can be had again.

    Args:
        inner: a sampler or batch sampler.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._samplers: tuple[Any, ...] = (inner, getattr(inner, "sampler", None))
        self._skip = 0
        self._begin: Mapping[str, Any] | None = None
        self._began: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __len__(self) -> int:
        return len(self._inner)

    @property
    def draws(self) -> bool:
        """Whether the order is drawn anew each epoch, from random states that a checkpoint has to hold."""
        known = [sampler for sampler in self._samplers if hasattr(sampler, "set_epoch")]
        return not known and not any(isinstance(sampler, SequentialSampler) for sampler in self._samplers)

    def position(self) -> dict[str, Any] | None:
        """For a checkpoint: what this epoch's order was drawn from, and what the next one's will be.

        None if it is a function of the epoch.
        """
        if not self.draws:
            return None
        return {"began": self._began, "own": [generator.get_state() for generator in self._generators()]}

    def start_at(self, skip: int, epoch: int, position: Mapping[str, Any] | None) -> None:
        """Lets the next iteration leave out its first items.

        Args:
            skip: how many.
            epoch: the epoch's number, for samplers that draw by it.
            position: what :meth:`position` was in the run that wrote the checkpoint.

        Raises:
            DataError: the order cannot be drawn again.
        """
        for sampler in self._samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        if not skip:
            self._set_own((position or {}).get("own", ()))
            return
        began = (position or {}).get("began")
        if self.draws and began is None:
            raise DataError(
                f"the order of {type(self._inner).__name__} is drawn from a random state that the checkpoint does not "
                "hold for this layout of ranks: resume with the layout that wrote it, or shuffle with a sampler that "
                "draws by (seed, epoch), such as DistributedSampler (Trainer(use_distributed_sampler=True))."
            )
        self._skip, self._begin = skip, began

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that the order is drawn when the first item is asked for, as torch's own samplers do.
        skip, begin = self._skip, self._begin
        self._skip, self._begin = 0, None
        if begin is None:
            self._began = self._states()
            items: Iterator[Any] = iter(self._inner)
            for _ in range(skip):
                next(items, None)
            yield from items
            return
        present = self._states(own=False)
        self._set(begin)
        self._began = dict(begin)
        items = iter(self._inner)
        for _ in range(skip):
            next(items, None)
        first = next(items, None)  # a sampler draws when it is first asked
        self._set(present)
        if first is not None:
            yield first
            yield from items

    def _generators(self) -> list[torch.Generator]:
        found = [getattr(sampler, "generator", None) for sampler in self._samplers]
        unique = {id(one): one for one in found if isinstance(one, torch.Generator)}
        return list(unique.values())

    def _states(self, own: bool = True) -> dict[str, Any]:
        if not self.draws:
            return {}
        return {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": numpy.random.get_state(),
            "own": [generator.get_state() for generator in self._generators()] if own else [],
        }

    def _set(self, states: Mapping[str, Any]) -> None:
        if not states:
            return
        torch.set_rng_state(states["torch"])
        random.setstate(states["python"])
        numpy.random.set_state(states["numpy"])
        self._set_own(states["own"])

    def _set_own(self, states: Sequence[Any]) -> None:
        for generator, state in zip(self._generators(), states, strict=False):
            generator.set_state(state)


class SteppedLoader:
    """A stateful loader whose state is that of the batches trained on, not of those that were fetched ahead.

    Args:
        loader: has ``state_dict`` and ``load_state_dict``, and no length.
        fetched_ahead: how many batches the Trainer holds that are not trained on yet.
    """

    def __init__(self, loader: Any, fetched_ahead: Callable[[], int]) -> None:
        self._loader, self._fetched_ahead = loader, fetched_ahead
        self._states: deque[Any] = deque(maxlen=4)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_loader" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        self._note()
        for batch in batches:
            self._note()
            yield batch

    def state_dict(self) -> Any:
        """The loader's state after the batch that was trained on last."""
        ahead = self._fetched_ahead()
        return self._states[-1 - ahead] if len(self._states) > ahead else self._loader.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Hands the state to the loader."""
        self._loader.load_state_dict(state)

    def _note(self) -> None:
        self._states.append(copy.deepcopy(self._loader.state_dict()))


class RestOf(Sequence[Any]):
    """A sequence of batches that starts behind its first ones, once, with the length of the whole."""

    def __init__(self, batches: Sequence[Any], skip: int) -> None:
        self._batches, self._skip = batches, skip

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return self._batches[index]

    def __iter__(self) -> Iterator[Any]:
        skip, self._skip = self._skip, 0
        return (self._batches[number] for number in range(skip, len(self._batches)))
