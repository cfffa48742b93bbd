"""Which boxes of which global tensors a rank holds: pure arithmetic, no files and no communication.

A box is an axis-parallel block of a tensor. A local parameter maps to a list of boxes of canonical global tensors
(several where a layer fuses them), and so does a flat range of it, such as a ZeRO-1 piece. Fused names, padding and
flat ranges end here: nothing above or on disk ever sees one.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_lightning.parallel.spec import get_spec

CHUNK_BYTES = 4 << 20
"""A box that several ranks hold is cut among them into pieces of at least this size."""


@dataclass(frozen=True, order=True)
class Box:
    """The elements ``offset[d] <= index[d] < offset[d] + shape[d]`` of a tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def within(self, outer: Box) -> Box:
        """The same elements, counted from where ``outer`` starts."""
        return Box(tuple(a - b for a, b in zip(self.offset, outer.offset, strict=True)), self.shape)

    def moved(self, by: Sequence[int]) -> Box:
        """The box shifted by ``by``."""
        return Box(tuple(a + b for a, b in zip(self.offset, by, strict=True)), self.shape)


@dataclass(frozen=True)
class Placement:
    """A box of a global tensor and where a local tensor holds it.

    Attributes:
        name: canonical name of the global tensor.
        global_shape: its shape, without padding.
        box: the elements of it.
        local: the same elements in the local tensor.
    """

    name: str
    global_shape: tuple[int, ...]
    box: Box
    local: Box


def whole(shape: Sequence[int]) -> Box:
    """The box of all elements of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def intersect(a: Box, b: Box) -> Box | None:
    """The elements in both, or None if there are none."""
    starts = tuple(max(p, q) for p, q in zip(a.offset, b.offset, strict=True))
    stops = [min(p + n, q + m) for p, n, q, m in zip(a.offset, a.shape, b.offset, b.shape, strict=True)]
    shape = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    return None if any(extent <= 0 for extent in shape) else Box(starts, shape)


def subtract(box: Box, hole: Box) -> list[Box]:
    """The elements of ``box`` that are not in ``hole``, as disjoint boxes (at most two for each dimension)."""
    common = intersect(box, hole)
    if common is None:
        return [box] if box.numel else []
    rest: list[Box] = []
    offset, shape = list(box.offset), list(box.shape)
    for d in range(len(shape)):
        before = common.offset[d] - offset[d]
        after = offset[d] + shape[d] - common.offset[d] - common.shape[d]
        for start, extent in ((offset[d], before), (common.offset[d] + common.shape[d], after)):
            if extent:
                cut = Box((*offset[:d], start, *offset[d + 1 :]), (*shape[:d], extent, *shape[d + 1 :]))
                rest.append(cut)
        offset[d], shape[d] = common.offset[d], common.shape[d]
    return rest


def cover(wanted: Box, sources: Iterable[Box]) -> tuple[list[tuple[int, Box]], list[Box]]:
    """How to put ``wanted`` together from ``sources``, each element once.

    Returns:
        Pairs of (index of the source, elements to take from it), and what no source holds.
    """
    uncovered = [wanted] if wanted.numel else []
    plan: list[tuple[int, Box]] = []
    for index, source in enumerate(sources):
        if not uncovered:
            break
        left: list[Box] = []
        for box in uncovered:
            if (common := intersect(box, source)) is not None:
                plan.append((index, common))
            left += subtract(box, source)
        uncovered = left
    return plan, uncovered


def split(box: Box, pieces: int) -> list[Box]:
    """Cuts ``box`` into at most ``pieces`` boxes of nearly equal size along its longest dimension."""
    if pieces <= 1 or not box.shape:
        return [box]
    d = max(range(len(box.shape)), key=lambda i: box.shape[i])
    pieces = min(pieces, box.shape[d])
    edges = [box.shape[d] * i // pieces for i in range(pieces + 1)]
    return [
        Box(
            (*box.offset[:d], box.offset[d] + start, *box.offset[d + 1 :]),
            (*box.shape[:d], stop - start, *box.shape[d + 1 :]),
        )
        for start, stop in itertools.pairwise(edges)
    ]


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The elements ``start <= i < stop`` of a row-major tensor as boxes, in order: at most 2 * dimensions - 1."""
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [Box((start,), (stop - start,))] if shape else [Box((), ())]
    row = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        return _in_row(shape, first, head, tail)
    boxes = _in_row(shape, first, head, row) if head else []
    first += bool(head)
    if last > first:
        boxes.append(Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])))
    return boxes + (_in_row(shape, last, 0, tail) if tail else [])


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> list[Box]:
    return [Box((row, *b.offset), (1, *b.shape)) for b in flat_boxes(shape[1:], start, stop)]


def placements(name: str, param: Tensor, tp_size: int) -> list[Placement]:
    """Where the elements of a local parameter (or buffer) stand in canonical global tensors.

    Args:
        name: its name in the module; the last component is replaced where the spec names a part.
        param: the local tensor, with its shard spec if it has one.
        tp_size: tensor-parallel size of the layout.

    Returns:
        One placement for each part, in order; padding is in none of them. A part of which this rank holds
        nothing has a box without elements.
    """
    prefix = name.rpartition(".")[0]
    found = []
    for part in get_spec(param, tp_size).parts:
        canonical = name if not part.name else f"{prefix}.{part.name}" if prefix else part.name
        found.append(
            Placement(
                canonical,
                tuple(part.global_shape),
                Box(tuple(part.global_offset), tuple(part.shape)),
                Box(tuple(part.local_offset), tuple(part.shape)),
            )
        )
    return found


def flat_placements(name: str, param: Tensor, tp_size: int, start: int, stop: int) -> list[Placement]:
    """As :func:`placements`, for the elements ``start <= i < stop`` of the flattened local parameter only."""
    pieces = flat_boxes(tuple(param.shape), start, stop)
    found = []
    for part in placements(name, param, tp_size):
        shift = tuple(g - o for g, o in zip(part.box.offset, part.local.offset, strict=True))
        for piece in pieces:
            if (common := intersect(piece, part.local)) is not None:
                found.append(Placement(part.name, part.global_shape, common.moved(shift), common))
    return found


def view(tensor: Tensor, box: Box) -> Tensor:
    """The elements of ``box`` as a view of ``tensor``."""
    for d, (start, extent) in enumerate(zip(box.offset, box.shape, strict=True)):
        tensor = tensor.narrow(d, start, extent)
    return tensor


def flat_view(flat: Tensor, start: int, shape: Sequence[int], box: Box) -> Tensor:
    """The elements of ``box`` of a row-major tensor of ``shape``, of which ``flat`` holds those from ``start`` on."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    first = sum(o * s for o, s in zip(box.offset, strides, strict=True)) - start
    return torch.as_strided(flat, box.shape, strides, flat.storage_offset() + first)


@dataclass(frozen=True)
class Holding:
    """A box that some rank could write.

    Attributes:
        name: of the global tensor.
        box: the elements.
        itemsize: bytes for each.
        spread: whether the ranks that hold it share the work; otherwise the lowest of them writes it.
    """

    name: str
    box: Box
    itemsize: int
    spread: bool = True


def assign(held: Sequence[Sequence[Holding]]) -> list[list[tuple[str, Box]]]:
    """Shares out the writing: each box that several ranks hold is written once.

    Every rank computes the same answer from the same ``held``. Large boxes are cut among their holders, and each
    piece goes to the holder that has the least to write so far, so that all finish together.

    Args:
        held: by rank, what it holds.

    Returns:
        By rank, the (name, box) that it writes.
    """
    holders: dict[tuple[str, Box], list[int]] = defaultdict(list)
    facts: dict[tuple[str, Box], Holding] = {}
    for rank, holdings in enumerate(held):
        for holding in holdings:
            if holding.box.numel:
                holders[holding.name, holding.box].append(rank)
                facts.setdefault((holding.name, holding.box), holding)
    load = [0] * len(held)
    work: list[list[tuple[str, Box]]] = [[] for _ in held]
    order = sorted(holders, key=lambda k: (len(holders[k]), -k[1].numel * facts[k].itemsize, k))
    for name, box in order:
        ranks, holding = holders[name, box], facts[name, box]
        size = box.numel * holding.itemsize
        pieces = min(len(ranks), -(-size // CHUNK_BYTES)) if holding.spread else 1
        for piece in split(box, pieces):
            owner = min(ranks, key=lambda r: (load[r], r)) if holding.spread else ranks[0]
            load[owner] += piece.numel * holding.itemsize
            work[owner].append((name, piece))
    return work
