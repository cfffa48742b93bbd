"""SIGKILL during a restore, or within three steps after it: what it was restored from is untouched."""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.faults import drill
from tests.faults.crew import read_trace
from tests.faults.harness import Outcome, Pools, rng
from tests.faults.training import Job

NUMBER, TITLE = 4, "kill during restore or ≤ 3 steps after"
FULL, SHARE = 50, 3
_STEPS_AFTER = 3
_INTERVAL = 4
_KINDS: list[dict[str, Any]] = [
    {},
    {"tp": 2, "precision": "bf16-true", "ours": True, "auto_resume": True},
    {"ours": True, "asynchronous": True, "accumulate": 2},
]


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """Half of them in the restore."""
    found = []
    for index in range(count):
        draw = rng(NUMBER, index, seed)
        job = Job(**draw.choice(_KINDS), interval=_INTERVAL)
        case = {"job": asdict(job), "rank": draw.randrange(drill.WORLD), "restored": draw.choice([4, 8])}
        found.append({**case, "where": ["restore", "after"][index % 2], "share": draw.random()})
    return found


@functools.cache
def _undisturbed(job: Job, step: int) -> list[list[tuple[float, str]]]:
    """Traces of a resume from ``step``."""
    folder = Path(tempfile.mkdtemp(prefix="faults-resume-"))
    try:
        begun = drill.begin_at(drill.reference(job), folder, step)
        drill.run_to_end(job, folder, 1, str(begun))
        return [read_trace(folder / f"trace-1-{rank}") for rank in range(drill.WORLD)]
    finally:
        shutil.rmtree(folder)


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """The span is from the first read to the first step, or from there over three steps."""
    job, rank, step = Job(**case["job"]), case["rank"], case["restored"]
    trace = _undisturbed(job, step)[rank]
    times = {name: when for when, name in reversed(trace)}
    trained = times[f"train from {step}"]
    spans = {
        "restore": (times["restore"], trained),
        "after": (trained, times[f"step {step + _STEPS_AFTER}"]),
    }
    first, last = spans[case["where"]]
    strike = drill.strike_at(trace, rank, first + case["share"] * (last - first))
    begun = drill.begin_at(drill.reference(job), scratch, step)
    before = _contents(begun)
    outcome = drill.drill(job, scratch, strike, begun=begun)
    if outcome.verdict == "ok" and _contents(begun) != before:
        return Outcome("lost", f"{begun} has changed")
    return outcome


def _contents(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.iterdir()
    }
