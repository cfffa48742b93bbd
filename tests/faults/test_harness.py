"""The fault harness itself: results add up over shards and runs, and every way to fail is counted."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType
from typing import Any

from neuron_lightning.testing import RankFailure
from tests.faults import harness
from tests.faults.table import print_table


def make_row(run: Any, full: int = 7) -> Any:
    row: Any = ModuleType("row_99_made_up")
    row.__file__ = __file__
    row.NUMBER, row.TITLE, row.FULL, row.SHARE, row.SOURCES, row.TIMEOUT_S = 99, "made up", full, 2, (), 0.2
    row.cases = lambda count, seed: [
        {"n": n, "draw": harness.rng(99, n, seed).random()} for n in range(count)
    ]
    row.run = run
    return row


def plan(row: Any, folder: Path, **options: Any) -> harness.Plan:
    return harness.Plan(chosen=[row], results=folder / "r.jsonl", scratch=folder / "scratch", **options)


def ok(case: dict[str, Any], scratch: Path, pools: harness.Pools) -> harness.Outcome:
    assert scratch.is_dir()
    (scratch / "file").write_text("x")
    return harness.Outcome("ok", f"{'even' if case['n'] % 2 == 0 else 'odd'}: {case['n']}")


def test_shards_add_up_and_nothing_runs_twice(tmp_path: Path) -> None:
    lines: list[str] = []
    row = make_row(ok)
    for shard in ((1, 2), (2, 2)):
        assert harness.run_plan(plan(row, tmp_path, shard=shard), lines.append)
    assert lines[0].startswith("4 cases")
    assert [line for line in lines if " cases to run" in line][1].startswith("3 cases")
    assert harness.run_plan(plan(row, tmp_path), lines.append)
    assert lines[-1].startswith("0 cases")
    assert print_table({99: row}, [tmp_path / "r.jsonl"], lines.append, complete=True)
    assert lines[-3].split()[:10] == ["99", "made", "up", "7", "7", "7", "0", "0", "0", "0"]
    assert "even 4, odd 3" in lines[-2]
    assert not list((tmp_path / "scratch").iterdir())


def test_another_seed_and_other_sources_run_again(tmp_path: Path) -> None:
    row, lines = make_row(ok), []
    harness.run_plan(plan(row, tmp_path, count=3), lines.append)
    harness.run_plan(plan(row, tmp_path, count=3, seed=5), lines.append)
    assert lines[4].startswith("3 cases")
    row.SOURCES = ("setup.py",)
    harness.run_plan(plan(row, tmp_path, count=1), lines.append)
    assert lines[8] == "1 cases to run; 6 results of other sources passed over"
    assert not print_table({99: row}, [tmp_path / "r.jsonl"], lines.append, complete=True)


def raises(case: dict[str, Any], scratch: Path, pools: harness.Pools) -> harness.Outcome:
    if case["n"] == 0:
        raise RankFailure("timeout: after 1 s", {}, None)
    if case["n"] == 1:
        raise ValueError("broken")
    if case["n"] == 2:
        time.sleep(5)
    return harness.Outcome("lost", "step 3 is gone")


def test_every_failure_is_counted_and_keeps_its_folder(tmp_path: Path) -> None:
    row, lines = make_row(raises), []
    assert not harness.run_plan(plan(row, tmp_path, stop_after=4), lines.append)
    known, _ = harness.read_results([tmp_path / "r.jsonl"], [row])
    assert [known[99, n, 0].verdict for n in range(4)] == ["hang", "wrong", "hang", "lost"]
    assert "ValueError: broken" in known[99, 1, 0].detail
    assert len(list((tmp_path / "scratch").iterdir())) == 4
    assert not print_table({99: row}, [tmp_path / "r.jsonl"], lines.append)
    assert any("FAIL row 99 case 3 seed 0: lost: step 3 is gone" in line for line in lines)


def test_no_results_is_no_success(tmp_path: Path) -> None:
    assert not print_table({99: make_row(ok)}, [tmp_path / "none.jsonl"], lambda line: None)


def test_a_line_that_was_cut_off_is_run_again(tmp_path: Path) -> None:
    row, lines = make_row(ok), []
    harness.run_plan(plan(row, tmp_path, count=2), lines.append)
    file = tmp_path / "r.jsonl"
    file.write_text(file.read_text()[:-20])
    harness.run_plan(plan(row, tmp_path, count=2), lines.append)
    assert lines[3].startswith("1 cases")
