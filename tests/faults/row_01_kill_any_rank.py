"""SIGKILL a random rank of a training job, at a time that is uniform over the run; every other one aimed at a save."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.faults import drill
from tests.faults.harness import Outcome, Pools, rng
from tests.faults.training import Job

NUMBER, TITLE = 1, "SIGKILL a random rank, ≥30 % mid-save"
FULL, SHARE = 200, 5


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """Job, rank and moment by chance."""
    found = []
    for index in range(count):
        draw = rng(NUMBER, index, seed)
        found.append(
            {
                "job": asdict(drill.draw_job(draw)),
                "rank": draw.randrange(drill.WORLD),
                "where": "save" if index % 2 == 0 else "any",
                "share": draw.random(),
                "number": draw.randrange(4),
                "patient": draw.random() < 0.1,
            }
        )
    return found


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """Kill, look, go on, compare."""
    job = Job(**case["job"])
    strike = drill.aim(drill.reference(job), case["rank"], case["where"], case["share"], case["number"])
    return drill.drill(job, scratch, strike, patient=case["patient"])
