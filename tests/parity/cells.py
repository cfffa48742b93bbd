"""The grid of layouts and settings whose training must be that of one rank.

At tp = 1 sequence parallel is switched off by the model (a unit test says so) and key/value heads are never fewer
than ranks, so that those two axes exist for tp > 1 only: 288 + 48 cells.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

LAYOUTS = ((2, 1), (1, 2), (2, 2), (4, 1), (1, 4))
OPTIMIZERS = ("AdamW", "Adam", "SGD")


@dataclass(frozen=True)
class Cell:
    """One way to train the tiny model.

    Attributes:
        tp, dp: the layout.
        zero1: whether optimizer state is sharded.
        sp: sequence parallel.
        accumulation: micro-batches of a step.
        tied: whether head and embedding are one.
        few_kv: whether there are fewer key/value heads than tensor-parallel ranks.
        optimizer: name in ``torch.optim``; SGD has momentum.
    """

    tp: int
    dp: int
    zero1: bool
    sp: bool
    accumulation: int
    tied: bool
    few_kv: bool
    optimizer: str

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tp * self.dp

    @property
    def kv_heads(self) -> int:
        """4, or few: tp / 2 (groups of two ranks share a head), and for tied cells of tp = 4 one."""
        if not self.few_kv:
            return 4
        return 1 if self.tied else self.tp // 2

    @property
    def reference(self) -> Cell:
        """The same training on one rank, in one micro-batch."""
        kv_heads = {4: 4, 1: 1, 2: 2}[self.kv_heads]
        return Reference(1, 1, False, False, 1, self.tied, False, self.optimizer, kv_heads)

    def __str__(self) -> str:
        flags = [
            f"tp{self.tp}xdp{self.dp}",
            "zero1" if self.zero1 else "plain",
            "sp" if self.sp else "nosp",
            f"acc{self.accumulation}",
            "tied" if self.tied else "untied",
            "fewkv" if self.few_kv else "kv",
            self.optimizer,
        ]
        return "-".join(flags)

    def axes(self) -> dict[str, Any]:
        """Value on each axis, the layout as one."""
        values = asdict(self)
        return {"layout": f"{values.pop('tp')}x{values.pop('dp')}", **values}


@dataclass(frozen=True)
class Reference(Cell):
    """One rank; says itself how many key/value heads there are."""

    heads: int = 4

    @property
    def kv_heads(self) -> int:
        """As the cell that it is compared with."""
        return self.heads


def grid() -> list[Cell]:
    """All cells, in a fixed order."""
    switch = (False, True)
    return [
        Cell(tp, dp, zero1, sp, accumulation, tied, few_kv, optimizer)
        for (tp, dp), zero1, sp, accumulation, tied, few_kv, optimizer in itertools.product(
            LAYOUTS, switch, switch, (1, 4), switch, switch, OPTIMIZERS
        )
        if tp > 1 or not (sp or few_kv)
    ]


def pairwise(cells: Sequence[Cell]) -> list[Cell]:
    """A small subset in which every two axis values that occur together in ``cells`` do so again."""
    uncovered = set().union(*(_pairs(cell) for cell in cells))
    chosen: list[Cell] = []
    while uncovered:
        best = max(cells, key=lambda cell: len(_pairs(cell) & uncovered))
        chosen.append(best)
        uncovered -= _pairs(best)
    return chosen


def _pairs(cell: Cell) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations(sorted(cell.axes().items()), 2))
