"""What the simulated device of this process was asked to do, for tests to hold against what it should have been."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from neuron_sim import _C

_NOT_ASKING = (os.path.dirname(torch.__file__) + os.sep, __file__)


@dataclass(frozen=True)
class Collective:
    """One call, without point-to-point ones.

    Attributes:
        kind: ``all_reduce``, ``all_gather``, …
        reduction: ``sum``, …; empty where nothing is reduced.
        dtype: of the tensors.
        ranks: the group's, as ranks of the world.
        numel: elements given by one rank (of the result, for a reduce-scatter).
    """

    kind: str
    reduction: str
    dtype: str
    ranks: tuple[int, ...]
    numel: int


@dataclass(frozen=True)
class Counts:
    """Since the last :func:`reset`, by name.

    Attributes:
        operators: all that ran.
        fallbacks: those of them without a lowering.
        float64: those of them that computed in 64-bit floating point.
        transfers: ``to host``, ``to device``, ``scalar`` (a value read), ``shape`` (a size read).
        collectives: in order.
    """

    operators: dict[str, int]
    fallbacks: dict[str, int]
    float64: dict[str, int]
    transfers: dict[str, int]
    collectives: tuple[Collective, ...]

    @property
    def waits(self) -> int:
        """How often the host had to wait for the device."""
        return sum(number for what, number in self.transfers.items() if what != "to device")


def counts() -> Counts:
    """So far."""
    seen = _C.counts()
    collectives = tuple(Collective(*one) for one in seen.pop("collectives"))
    return Counts(**seen, collectives=collectives)


def reset() -> None:
    """Begins anew."""
    _C.reset_counts()


@dataclass(frozen=True)
class Place:
    """Who asked for something that real hardware would be slow at.

    Attributes:
        what: ``fallback``, ``to host``, ``scalar`` or ``shape``.
        operator: its name.
        file: of the innermost frame that is not PyTorch's; ``autograd`` where the backward pass asked.
        line: in it.
    """

    what: str
    operator: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.what}: {self.operator} at {self.file}:{self.line}"


@contextmanager
def places() -> Iterator[Counter[Place]]:
    """Counts, by where they came from, the fallbacks and the transfers to the host in the block."""
    found: Counter[Place] = Counter()

    def listen(what: str, name: str) -> None:
        found[_place(what, name)] += 1

    _C.set_listener(listen)
    try:
        yield found
    finally:
        _C.set_listener(None)


def _place(what: str, operator: str) -> Place:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_ASKING):
        frame = frame.f_back
    if frame is None:
        return Place(what, operator, "autograd", 0)
    return Place(what, operator, frame.f_code.co_filename, frame.f_lineno)


def check_order(by_rank: Sequence[Sequence[Collective]]) -> None:
    """That the ranks of each group called the same collectives in the same order: else real devices hang.

    Args:
        by_rank: what each rank of the world recorded.

    Raises:
        AssertionError: with the first difference.
    """
    groups = {one.ranks for calls in by_rank for one in calls}
    for ranks in sorted(groups):
        orders = {rank: [one for one in by_rank[rank] if one.ranks == ranks] for rank in ranks}
        first = orders[ranks[0]]
        for rank, order in orders.items():
            for position, (mine, theirs) in enumerate(zip(first, order, strict=False)):
                assert mine == theirs, (
                    f"call {position} in the group of ranks {ranks}: rank {ranks[0]} made {mine}, "
                    f"rank {rank} made {theirs}"
                )
            assert len(first) == len(order), (
                f"in the group of ranks {ranks}, rank {ranks[0]} made {len(first)} calls and rank {rank} {len(order)}"
            )
