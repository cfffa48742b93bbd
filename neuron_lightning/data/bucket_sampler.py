"""Batches of samples of similar length, of the same bucket on all ranks at the same step."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Sampler

from neuron_lightning.data.buckets import LENGTH_REMEDY, check_buckets
from neuron_lightning.data.shuffle import Permutation
from neuron_lightning.errors import ConfigError, DataError

_Ids = npt.NDArray[np.int64]


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of samples that belong in the same bucket, on all data-parallel ranks at the same step.

    It yields lists of sample ids, for ``DataLoader(batch_sampler=…)``. Within a bucket samples are put in an order
    drawn by (seed, epoch) and cut into groups of ``group_size``; the groups of all buckets are put in a drawn order.
    Step ``t`` takes the next ``batch_size * num_replicas`` samples of its group, and rank ``r`` of these the ones at
    places ``r``, ``r + num_replicas``, …. So every rank sees the same number of batches, and which samples a step
    trains on depends on the number of ranks through ``batch_size * num_replicas`` and ``group_size`` alone.

    Remainder: in each bucket, fewer samples than a group are left at the end of the order.

    - ``drop_last=True`` leaves them out of this epoch. With ``shuffle`` other samples are left out in the next one,
      but a bucket with fewer samples than one group is never read; rank 0 warns of that.
    - ``drop_last=False`` reads every sample. The remainder of a bucket is one step at the end of the epoch, in which
      a rank gets fewer than ``batch_size`` samples, and their numbers differ by at most one between ranks
      (``PadToBuckets(batch_size=…)`` keeps the shape). If there are fewer samples than ranks, the ranks without one
      repeat one of these: fewer than ``num_replicas`` repetitions in a bucket, and none otherwise.

    Under the Trainer pass ``use_distributed_sampler=False``, or make the loader in a ``NeuronLightningDataModule``.

    Args:
        lengths: of each sample, in tokens: ints (a list, array or tensor), or a function from a sample's id to its
            length, which is called once for each of ``num_samples`` ids.
        buckets: those of ``PadToBuckets``.
        batch_size: samples of one rank's batch.
        num_replicas: data-parallel size.
        rank: data-parallel rank.
        shuffle: False reads the buckets from the longest to the shortest (a lack of memory shows in the first step),
            each in the dataset's order.
        seed: with the epoch, draws the order. Every rank gives the same.
        drop_last: see above.
        group_size: samples that stay together, a multiple of ``batch_size * num_replicas`` (default), with
            ``drop_last=True`` only. With the samples of an optimizer step here, the epoch is the same for every
            layout and accumulation, and a resume may change them. Without, a resume in the middle of an epoch
            must keep ``batch_size * num_replicas``: :meth:`load_state_dict` refuses another one, but the Trainer,
            which counts batches, cannot tell.
        truncate: samples longer than the largest bucket belong in it.
        num_samples: where ``lengths`` is a function.

    Raises:
        ConfigError: an argument is out of range, or a sample is too long.
        DataError: no samples, or with ``drop_last`` not one whole group.
    """

    def __init__(
        self,
        lengths: Sequence[int] | npt.NDArray[Any] | Tensor | Callable[[int], int],
        *,
        buckets: Iterable[int],
        batch_size: int,
        num_replicas: int,
        rank: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        group_size: int | None = None,
        truncate: bool = False,
        num_samples: int | None = None,
    ) -> None:
        self.buckets = check_buckets(buckets)
        self.batch_size, self.num_replicas, self.rank = batch_size, num_replicas, rank
        self.shuffle, self.seed, self.drop_last, self.epoch = shuffle, seed, drop_last, 0
        self._step_size = batch_size * num_replicas
        self.group_size = self._step_size if group_size is None else group_size
        self._check_layout()
        bucket_of = _buckets_of(_read_lengths(lengths, num_samples), self.buckets, truncate)
        self.num_samples = len(bucket_of)
        self._digest = hashlib.blake2b(bucket_of.astype("<i8").tobytes(), digest_size=8).hexdigest()
        # Longest bucket first, as everything below.
        self._members = [np.flatnonzero(bucket_of == b) for b in reversed(range(len(self.buckets)))]
        sizes = np.asarray([len(ids) for ids in self._members])
        self._group_ends = np.cumsum(sizes // self.group_size)
        self._remainders = [] if drop_last else np.flatnonzero(sizes % self.group_size).tolist()
        self._whole_steps = int(self._group_ends[-1]) * (self.group_size // self._step_size)
        self._position = 0
        self._check_dropped(sizes)

    def _check_layout(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {self.batch_size}.")
        if self.num_replicas < 1 or not 0 <= self.rank < self.num_replicas:
            raise ConfigError(
                f"rank {self.rank} of {self.num_replicas} replicas: the rank must lie in 0 … num_replicas - 1; pass "
                "the data-parallel rank and size."
            )
        step = f"the {self._step_size} samples of a step ({self.batch_size} on each of {self.num_replicas} ranks)"
        if self.group_size < 1 or self.group_size % self._step_size:
            raise ConfigError(f"group_size {self.group_size} must be a multiple of {step}.")
        if self.group_size > self._step_size and not self.drop_last:
            raise ConfigError(
                f"group_size {self.group_size} is more than {step}, which needs drop_last=True: a remainder would "
                "not make the same steps under every layout."
            )

    def _check_dropped(self, sizes: _Ids) -> None:
        if not self.drop_last:
            return
        counts = {b: int(n) for b, n in zip(reversed(self.buckets), sizes, strict=True) if n}
        remedy = "pass drop_last=False, fewer buckets, or a smaller batch."
        if not self._whole_steps:
            raise DataError(
                f"no bucket holds one global batch of {self.group_size} samples (samples by bucket: {counts}), and "
                f"drop_last leaves out what is less: {remedy}"
            )
        if self.rank == 0 and min(counts.values()) < self.group_size:
            warnings.warn(
                f"with drop_last, buckets with fewer samples than a global batch of {self.group_size} are never read; "
                f"samples by bucket: {counts}; {remedy}",
                stacklevel=3,
            )

    @property
    def sampler(self) -> BucketBatchSampler:
        """Itself: Lightning calls ``set_epoch`` of a batch sampler's ``sampler`` only."""
        return self

    @property
    def position(self) -> int:
        """Places of this epoch's order behind which every iteration of it starts.

        A step takes ``batch_size * num_replicas`` places, the one of a remainder too. As with
        :class:`~neuron_lightning.data.PositionalSampler` it is set by whoever counts what was trained on, and goes
        back to 0 when :meth:`set_epoch` moves to another epoch.
        """
        return self._position

    @position.setter
    def position(self, places: int) -> None:
        last = len(self) * self._step_size
        if not 0 <= places <= last or places % self._step_size:
            raise ConfigError(
                f"position {places} must lie in 0 … {last} and be a multiple of the {self._step_size} samples of a "
                f"step ({self.batch_size} on each of {self.num_replicas} data-parallel ranks)."
            )
        self._position = places

    def __iter__(self) -> Iterator[list[int]]:
        key = f"{self.seed}/{self.epoch}"
        groups = self._drawn(int(self._group_ends[-1]), f"{key}/groups")
        orders = [
            self._drawn(len(ids), f"{key}/{bucket}")
            for ids, bucket in zip(self._members, reversed(self.buckets), strict=True)
        ]
        for step in range(self._position // self._step_size, len(self)):
            bucket, start, stop = self._places(step, groups)
            ids = self._members[bucket][orders[bucket](np.arange(start, stop, dtype=np.int64))]
            mine = ids[self.rank :: self.num_replicas]
            yield (mine if len(mine) else ids[[self.rank % len(ids)]]).tolist()

    def __len__(self) -> int:
        """Steps of a whole epoch, the same on every rank, wherever the next iteration starts."""
        return self._whole_steps + len(self._remainders)

    def set_epoch(self, epoch: int) -> None:
        """Takes the order of ``epoch``; the position is kept only if that is the epoch already."""
        if epoch != self.epoch:
            self._position = 0
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Epoch, position and all that the order is drawn from; the same on every rank."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self._position,
            "num_samples": self.num_samples,
            "buckets": list(self.buckets),
            "bucket_of_each_sample": self._digest,
            "group_size": self.group_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to the place that :meth:`state_dict` described, under any ranks that leave ``group_size`` as it is.

        Raises:
            ConfigError: the order would be another one, or this layout cannot start at that position.
        """
        for name, mine in self.state_dict().items():
            if name not in ("epoch", "position") and state.get(name) != mine:
                raise ConfigError(
                    f"the saved order has {name} {state.get(name)}, this run has {mine}: the order would be another "
                    "one; resume with the same data and settings, or start over."
                )
        self.epoch = state["epoch"]
        self.position = state["position"]

    def _places(self, step: int, groups: Callable[[_Ids], _Ids]) -> tuple[int, int, int]:
        """Of a step over all ranks: the bucket's number, first place in the bucket's order, and the end."""
        if step >= self._whole_steps:
            bucket = self._remainders[step - self._whole_steps]
            size = len(self._members[bucket])
            return bucket, size - size % self.group_size, size
        number, offset = divmod(step * self._step_size, self.group_size)
        group = int(groups(np.asarray([number], dtype=np.int64))[0])
        bucket = int(np.searchsorted(self._group_ends, group, side="right"))
        first = int(self._group_ends[bucket - 1]) if bucket else 0
        start = (group - first) * self.group_size + offset
        return bucket, start, start + self._step_size

    def _drawn(self, size: int, key: str) -> Callable[[_Ids], _Ids]:
        return Permutation(size, key) if self.shuffle else lambda places: places


def _read_lengths(lengths: Any, num_samples: int | None) -> _Ids:
    if callable(lengths) != (num_samples is not None):
        raise ConfigError(
            "num_samples must be given where lengths is a function from an id to a length, and only there."
        )
    found = np.asarray([lengths(i) for i in range(num_samples or 0)] if callable(lengths) else lengths)
    if not found.size:
        raise DataError("there are no samples to put into batches: lengths is empty.")
    if found.ndim != 1 or found.dtype.kind not in "iu" or found.min() < 0:
        raise ConfigError(
            f"lengths must be ints of 0 or more, one for each sample, not {found.dtype} of shape {found.shape}"
            + (f" with a minimum of {found.min()}." if found.dtype.kind in "iuf" else ".")
        )
    return found.astype(np.int64)


def _buckets_of(lengths: _Ids, buckets: Sequence[int], truncate: bool) -> _Ids:
    """Number of the bucket of each sample."""
    longer = np.flatnonzero(lengths > buckets[-1])
    if len(longer) and not truncate:
        raise ConfigError(
            f"no sample may be longer than the largest bucket, {buckets[-1]}, but {len(longer)} of {len(lengths)} "
            f"are, the first of them sample {longer[0]} with {lengths[longer[0]]} tokens: {LENGTH_REMEDY}"
        )
    numbers: _Ids = np.minimum(np.searchsorted(buckets, lengths), len(buckets) - 1).astype(np.int64)
    return numbers
