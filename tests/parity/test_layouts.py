"""Every layout trains as one rank does: a pairwise-covering part of the grid (``make test-parity`` runs all)."""

from __future__ import annotations

import itertools

import pytest

from neuron_lightning.testing import RankPool
from tests.parity.cells import Cell, grid, pairwise
from tests.parity.training import TOLERANCE, Deviations, run_cell

CELLS = pairwise(grid())


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell_trains_as_one_rank(cell: Cell, request: pytest.FixtureRequest) -> None:
    pool: RankPool = request.getfixturevalue(f"pool{cell.world_size}")
    deviations = run_cell(cell, pool)
    print(cell, deviations)
    assert deviations.copies == 0.0
    assert deviations.worst <= TOLERANCE, deviations


def test_subset_covers_every_pair() -> None:
    def pairs(cells: list[Cell]) -> set[object]:
        return {p for c in cells for p in itertools.combinations(sorted(c.axes().items()), 2)}

    assert pairs(CELLS) == pairs(grid())
    assert len(CELLS) < 25
    assert len(grid()) == 336


def test_deviation_beyond_tolerance_fails() -> None:
    good = Deviations(loss=1e-15, grad_norm=1e-14, weight=1e-13, copies=0.0, tensor="w")
    assert good.passed
    assert not Deviations(loss=1e-15, grad_norm=1e-14, weight=2e-10, copies=0.0, tensor="w").passed
    assert not Deviations(loss=0.0, grad_norm=0.0, weight=0.0, copies=1e-16, tensor="w").passed
