"""Which element of which parameter lies where: pure arithmetic, the same on every rank.

Parameters are laid one after another into flat *buckets*. A bucket is cut into equal slices, one a
data-parallel rank; what a slice shares with a parameter is a *piece* of it. Nothing here touches a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from neuron_lightning.errors import OptimizerError
from neuron_lightning.parallel.spec import ShardSpec

ALIGNMENT = 64
"""Parameters and slices start at multiples of so many elements: whole vector registers and DMA bursts."""


class Slot(NamedTuple):
    """Where a whole parameter lies in its bucket.

    Attributes:
        param: position of the parameter in the optimizer's list of distinct parameters.
        offset: first element in the bucket.
        numel: number of elements.
    """

    param: int
    offset: int
    numel: int


class Piece(NamedTuple):
    """A run of elements of one parameter, inside one slice.

    Attributes:
        param: position of the parameter in the optimizer's list of distinct parameters.
        start: first element, counted in the flattened parameter.
        stop: one past the last element, counted in the flattened parameter.
        offset: where ``start`` lies in the bucket.
    """

    param: int
    start: int
    stop: int
    offset: int


class Run(NamedTuple):
    """A run of elements of a bucket that the tensor-parallel group treats alike.

    Attributes:
        start: first element in the bucket.
        stop: one past the last element in the bucket.
        replicas: ranks of the tensor-parallel group that hold the same elements.
        grad_ranks: consecutive tensor-parallel ranks over which the gradient must still be summed.
    """

    start: int
    stop: int
    replicas: int
    grad_ranks: int


@dataclass(frozen=True, kw_only=True)
class BucketLayout:
    """The slots of one bucket and its size, gaps and padding included.

    Attributes:
        slots: the parameters in it, by rising offset.
        size: elements; divisible by ``num_slices`` x :data:`ALIGNMENT`.
        num_slices: slices it is cut into.
    """

    slots: tuple[Slot, ...]
    size: int
    num_slices: int

    def slice_bounds(self, rank: int) -> tuple[int, int]:
        """First element of slice ``rank`` in the bucket, and one past its last."""
        length = self.size // self.num_slices
        return rank * length, (rank + 1) * length

    def pieces(self, rank: int) -> list[Piece]:
        """What slice ``rank`` holds of each parameter; parameters outside it are left out."""
        low, high = self.slice_bounds(rank)
        pieces = []
        for slot in self.slots:
            begin, end = max(low, slot.offset), min(high, slot.offset + slot.numel)
            if begin < end:
                pieces.append(Piece(slot.param, begin - slot.offset, end - slot.offset, begin))
        return pieces


def plan_buckets(numels: Sequence[int], *, max_numel: int, num_slices: int) -> list[BucketLayout]:
    """Lays parameters of ``numels`` elements into buckets, in order.

    Args:
        numels: elements of each parameter; empty ones get no slot.
        max_numel: a bucket is closed before it would grow beyond this; a larger parameter is alone in its own.
        num_slices: equal slices that each bucket must divide into.
    """
    buckets: list[BucketLayout] = []
    slots: list[Slot] = []
    end = 0
    for index, numel in enumerate(numels):
        if numel == 0:
            continue
        if slots and end + numel > max_numel:
            buckets.append(_close(slots, end, num_slices))
            slots, end = [], 0
        slots.append(Slot(index, end, numel))
        end = _round_up(end + numel, ALIGNMENT)
    if slots:
        buckets.append(_close(slots, end, num_slices))
    return buckets


def runs_of(pieces: Sequence[Piece], specs: Sequence[tuple[ShardSpec, int]]) -> list[Run]:
    """Cuts ``pieces`` where the tensor-parallel treatment changes.

    Args:
        pieces: pieces of one bucket.
        specs: by parameter index, its spec and the elements of one of its rows.

    Returns:
        Runs by rising start. Neighbours that are treated alike are joined across alignment gaps, which hold
        zeros.
    """
    runs: list[Run] = []
    for piece in pieces:
        spec, row_numel = specs[piece.param]
        begin = 0
        for part in spec.parts:
            end = begin + part.local_rows * row_numel
            low, high = max(begin, piece.start), min(end, piece.stop)
            if low < high:
                shift = piece.offset - piece.start
                _append(runs, Run(low + shift, high + shift, part.replicas, part.grad_ranks))
            begin = end
    return runs


def check_spec(spec: ShardSpec, shape: Sequence[int], row_numel: int) -> None:
    """Checks that the parts of ``spec`` cover a parameter of ``shape`` exactly.

    Raises:
        OptimizerError: they cover fewer or more rows than it has.
    """
    rows = sum(part.local_rows for part in spec.parts)
    expected = shape[0] if shape else 1
    if row_numel and rows != expected:
        raise OptimizerError(
            f"the shard specification of a parameter must cover all of its rows: its parts cover {rows}, a "
            f"parameter of shape {tuple(shape)} has {expected}; correct local_rows where set_spec() is called."
        )


def _append(runs: list[Run], run: Run) -> None:
    """Appends ``run``, or joins it to the last one if both are treated alike."""
    if runs and run[2:] == runs[-1][2:]:
        runs[-1] = runs[-1]._replace(stop=run.stop)
    else:
        runs.append(run)


def _close(slots: list[Slot], end: int, num_slices: int) -> BucketLayout:
    return BucketLayout(
        slots=tuple(slots), size=_round_up(end, num_slices * ALIGNMENT), num_slices=num_slices
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
