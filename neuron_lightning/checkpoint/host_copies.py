"""Device tensors by way of the host, all at once, where each one by itself would cost a graph or a transfer.

On a device that records graphs, reading the slices of a tensor compiles a graph for each, and writing into them
rebuilds it as often. So a save fetches whole tensors in one transfer and cuts them on the host, and a load fills copies
on the host and sends whole tensors back. Elsewhere nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from neuron_lightning.backends import get_backend
from neuron_lightning.checkpoint.state import ParamState, storage_key

Named = Mapping[str, Tensor]


class HostCopies:
    """Copies of tensors in host memory; tensors that are the same memory have the same copy.

    Args:
        tensors: to copy, in one transfer.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._live = {_key(t): t for t in tensors}
        fetched = get_backend().to_host(list(self._live.values()))
        self._copies = {key: copy.contiguous() for key, copy in zip(self._live, fetched, strict=True)}

    def of(self, tensor: Tensor) -> Tensor:
        """The copy of a tensor."""
        return self._copies[_key(tensor)]

    def named(self, tensors: Named) -> dict[str, Any]:
        """The copies of a state dict's tensors; what is no tensor stays."""
        return {name: self.of(t) if isinstance(t, Tensor) else t for name, t in tensors.items()}

    @torch.no_grad()
    def put_back(self) -> None:
        """Copies everything with at least one dimension back to the device (numbers are nobody's to change here)."""
        for key, live in self._live.items():
            if live.dim():
                live.detach().copy_(self._copies[key])


class FetchedOptimizer:
    """An optimizer as a checkpoint sees it, with its tensors on the host."""

    def __init__(self, optimizer: Any, copies: HostCopies) -> None:
        self._optimizer = optimizer
        self._copies = {id(t): copies.of(t) for t in optimizer.held_tensors()}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    def export_state(self) -> Sequence[ParamState]:
        """The optimizer's pieces, cut from the copies."""
        pieces: Sequence[ParamState] = self._optimizer.export_state(self._copies)
        return pieces


def fetched(
    module_state: Named, optimizers: Sequence[Any], averages: Mapping[str, Named] | None
) -> tuple[Named, Sequence[Any], Mapping[str, Named]]:
    """What is to be saved, on the host where the device records graphs, else as it is."""
    averages = averages or {}
    if not get_backend().records_graphs:
        return module_state, optimizers, averages
    states = [module_state, *averages.values()]
    held = [t for state in states for t in state.values() if isinstance(t, Tensor)]
    held += [t for optimizer in optimizers if fetchable(optimizer) for t in optimizer.held_tensors()]
    copies = HostCopies(held)
    return (
        copies.named(module_state),
        [FetchedOptimizer(o, copies) if fetchable(o) else o for o in optimizers],
        {key: copies.named(state) for key, state in averages.items()},
    )


@contextmanager
def landing(tensors: Named) -> Iterator[Named]:
    """Tensors to read into, which are in ``tensors`` when the block ends without an error."""
    if not get_backend().records_graphs:
        yield tensors
        return
    copies = HostCopies(t for t in tensors.values() if isinstance(t, Tensor))
    yield copies.named(tensors)
    copies.put_back()


def fetchable(optimizer: Any) -> bool:
    """Whether an optimizer says which tensors it holds."""
    return hasattr(optimizer, "held_tensors") and get_backend().records_graphs


def _key(tensor: Tensor) -> Any:
    return storage_key(tensor) or id(tensor)
