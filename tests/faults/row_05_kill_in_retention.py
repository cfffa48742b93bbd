"""SIGKILL while old checkpoints are being removed: as many as are to be kept are there, and whole."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.faults import drill
from tests.faults.harness import Outcome, Pools, rng
from tests.faults.training import Job

NUMBER, TITLE = 5, "kill during retention"
FULL, SHARE = 100, 3
_STEPS = 7
_KINDS: list[dict[str, Any]] = [
    {},
    {"tp": 2, "ours": True, "auto_resume": True},
    {"ours": True, "asynchronous": True, "auto_resume": True},
]


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """A save in every step; a third of the kills come when the old one has just lost its name."""
    found = []
    for index in range(count):
        draw = rng(NUMBER, index, seed)
        kind = draw.choice(_KINDS)
        job = Job(interval=1, steps=_STEPS, keep=draw.choice([1, 2, 3]), **kind)
        where = "remove_renamed" if index % 3 == 0 else "remove"
        case = {"job": asdict(job), "rank": draw.randrange(drill.WORLD) if where == "remove" else 0}
        found.append({**case, "where": where, "share": draw.random(), "number": draw.randrange(100)})
    return found


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """That ``keep`` are committed and intact is what every drill checks."""
    job, rank = Job(**case["job"]), case["rank"]
    removals = job.steps - job.keep
    if case["where"] == "remove_renamed":
        strike: Any = drill.Suicide(rank, "remove_renamed", 1 + case["number"] % removals)
    else:
        strike = drill.aim(drill.reference(job), rank, "remove", case["share"], case["number"])
    return drill.drill(job, scratch, strike)
