"""SIGKILL at every named point of a save, on rank 0 and on another, of a new target, a replaced one, behind the training."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.faults import drill
from tests.faults.harness import Outcome, Pools, rng
from tests.faults.training import Job

NUMBER, TITLE = 2, "SIGKILL at every named point of a save"

_EVERY_RANK = ("share_opened", "share_written", "share_synced", "gathered")
_RANK_0 = ("prepared", "manifest_written", "before_rename", "after_rename", "parent_synced")
_JOBS = {
    "fresh": Job(),
    "fresh tp=2": Job(tp=2, precision="bf16-true", ours=True, auto_resume=True),
    "replaced": Job(keep=0),
    "replaced tp=2": Job(tp=2, precision="bf16-true", keep=0, ours=True),
    "background": Job(asynchronous=True, ours=True, auto_resume=True),
    "background, replaced, tp=2": Job(
        tp=2, precision="bf16-true", keep=0, asynchronous=True, ours=True, auto_resume=True
    ),
}


def _combinations() -> list[dict[str, Any]]:
    """Every point where it is reached."""
    found = []
    for target, job in _JOBS.items():
        places = [(point, rank) for point in _EVERY_RANK for rank in range(drill.WORLD)]
        places += [(point, 0) for point in _RANK_0]
        if job.asynchronous:
            places += [("snapshot_taken", rank) for rank in range(drill.WORLD)]
        if job.keep == 0:
            places += [("renamed_aside", 0), ("old_removed", 0)]
        for point, rank in places:
            found.append({"target": target, "job": asdict(job), "point": point, "rank": rank})
    return found


FULL, SHARE = len(_combinations()), 6


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """All of them, in an order by chance; which save of the run is hit, by chance too."""
    every = _combinations()
    rng(NUMBER, -1, seed).shuffle(every)
    return [case | {"share": rng(NUMBER, i, seed).random()} for i, case in enumerate(every[:count])]


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """The n-th time that the point is reached is one of those of an undisturbed run."""
    job, point, rank = Job(**case["job"]), case["point"], case["rank"]
    aside = point == "renamed_aside"
    # Without the exchange of names the point is reached by every save but the first.
    trace = drill.reference(job).traces[rank]
    times = 3 if aside else sum(name == point for _, name in trace)
    number = 1 + int(case["share"] * times)
    outcome = drill.drill(job, scratch, drill.Suicide(rank, point, number, aside))
    if outcome.verdict != "ok":
        return outcome
    return Outcome("ok", f"{case['target']}: {point} on rank {rank}, {outcome.detail}")
