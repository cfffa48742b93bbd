"""The share of the fault matrix that runs with the other tests: the first cases of every row.

All rows together take at most six minutes on two cores; `make test-faults` runs the full numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Pools, Unavailable, describe, rows, run_case

ROWS = rows()
SEED = 0


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    with Pools() as warm:
        yield warm


@pytest.mark.parametrize("number", ROWS)
def test_row(number: int, pools: Pools, tmp_path: Path) -> None:
    row = ROWS[number]
    records = []
    for index, case in enumerate(row.cases(row.SHARE, SEED)):
        try:
            records.append(run_case(row, index, SEED, case, tmp_path, pools))
        except Unavailable as reason:
            pytest.skip(f"row {number}: {reason}")
    assert len(records) == row.SHARE
    failed = [describe(record) for record in records if record.verdict != "ok"]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("number", ROWS)
def test_cases_are_a_function_of_the_seed(number: int) -> None:
    row = ROWS[number]
    every = row.cases(row.FULL, 3)
    assert len(every) == row.FULL
    assert row.cases(row.SHARE, 3) == every[: row.SHARE]
