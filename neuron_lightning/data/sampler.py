"""The order of samples as a pure function of (seed, epoch), and the place in it as one integer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any, cast

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

from neuron_lightning.data.shuffle import Permutation
from neuron_lightning.errors import ConfigError, DataError

_CHUNK = 4096


class PositionalSampler(DistributedSampler[Any]):
    """Deals samples out to data-parallel ranks, and starts anywhere.

    The epoch's order is a permutation drawn by (seed, epoch); the sample at place ``p`` of it goes to rank
    ``p % num_replicas``. So after each rank took ``k`` samples, exactly the first ``k * num_replicas`` of the
    order are consumed, whatever the number of ranks: that count is ``position``, and a resume may change the
    number of ranks.

    Remainder: only whole groups of ``group_size`` samples (default: one per rank) are dealt out; the fewer than
    ``group_size`` samples at the end of the order are left out of this epoch. The next epoch's order is another
    one, so they take their turn there. With the global batch as ``group_size`` the epoch is the same for every
    layout.

    Args:
        dataset: anything with a length.
        num_replicas: data-parallel size.
        rank: data-parallel rank.
        seed: with the epoch, draws the order. Every rank gives the same.
        shuffle: False keeps the dataset's order.
        group_size: samples that belong together; a multiple of ``num_replicas``.

    Raises:
        ConfigError: rank or group size do not fit ``num_replicas``.
        DataError: fewer samples than one group.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        num_replicas: int,
        rank: int,
        seed: int = 0,
        shuffle: bool = True,
        group_size: int | None = None,
    ) -> None:
        if num_replicas < 1 or not 0 <= rank < num_replicas:
            raise ConfigError(
                f"rank {rank} of {num_replicas} replicas: the rank must lie in 0 … num_replicas - 1; pass the "
                "data-parallel rank and size."
            )
        group_size = num_replicas if group_size is None else group_size
        if group_size < 1 or group_size % num_replicas:
            raise ConfigError(f"group_size {group_size} must be a multiple of the {num_replicas} replicas.")
        super().__init__(
            cast(Dataset[Any], dataset), num_replicas, rank, shuffle=shuffle, seed=seed, drop_last=True
        )
        self.epoch_size = len(dataset) - len(dataset) % group_size
        if self.epoch_size == 0:
            raise DataError(
                f"{len(dataset)} samples are fewer than one global batch of {group_size}: give more data, shorter "
                "sequences, or a smaller batch."
            )
        self.num_samples = self.epoch_size // num_replicas
        self.total_size = self.epoch_size
        self._position = 0

    @property
    def position(self) -> int:
        """Samples of this epoch that all ranks together have consumed: where every iteration of it starts.

        It is set by whoever counts what was trained on (a sampler runs ahead of that by the batches that are
        being fetched), and goes back to 0 when :meth:`set_epoch` moves to another epoch.
        """
        return self._position

    @position.setter
    def position(self, samples: int) -> None:
        if not 0 <= samples <= self.epoch_size or samples % self.num_replicas:
            raise ConfigError(
                f"position {samples} must lie in 0 … {self.epoch_size} and be a multiple of the "
                f"{self.num_replicas} data-parallel ranks."
            )
        self._position = samples

    def order(self, start: int, stop: int) -> list[int]:
        """Sample ids at places ``start`` to ``stop`` of the epoch's order, over all ranks."""
        return self._ids(np.arange(start, stop, dtype=np.int64))

    def __iter__(self) -> Iterator[int]:
        first = self._position + self.rank
        for start in range(first, self.epoch_size, _CHUNK * self.num_replicas):
            stop = min(start + _CHUNK * self.num_replicas, self.epoch_size)
            yield from self._ids(np.arange(start, stop, self.num_replicas, dtype=np.int64))

    def __len__(self) -> int:
        """This rank's samples in a whole epoch, wherever the next iteration starts."""
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Takes the order of ``epoch``; the position is kept only if that is the epoch already."""
        if epoch != self.epoch:
            self._position = 0
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Seed, epoch, position and number of samples; the same on every rank."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self._position,
            "num_samples": len(cast(Sized, self.dataset)),
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to the place that :meth:`state_dict` described, under any number of ranks.

        Raises:
            ConfigError: another seed, another number of samples, or a position that this layout cannot start at.
        """
        mine = self.state_dict()
        for name in ("seed", "num_samples"):
            if state[name] != mine[name]:
                raise ConfigError(
                    f"the saved order has {name} {state[name]}, this run has {mine[name]}: the order would be "
                    "another one; resume with the same data and seed, or start over."
                )
        self.epoch = state["epoch"]
        self.position = state["position"]

    def _ids(self, places: np.ndarray[Any, np.dtype[np.int64]]) -> list[int]:
        if not self.shuffle:
            return cast("list[int]", places.tolist())
        permutation = Permutation(len(cast(Sized, self.dataset)), f"{self.seed}/{self.epoch}")
        return cast("list[int]", permutation(places).tolist())
