"""SIGTERM to one rank, or to all: one checkpoint at the next boundary, and everybody leaves."""

from __future__ import annotations

import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.faults import drill
from tests.faults.crew import Crew, count_trace, read_trace
from tests.faults.harness import Outcome, Pools, rng
from tests.faults.training import Job, train

NUMBER, TITLE = 6, "SIGTERM to one rank / all ranks"
FULL, SHARE = 100, 4
_SAVE_S = 10.0
"""What the save itself may take, on top of the 30 s."""


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """Every other one to all ranks, one after the other."""
    found = []
    for index in range(count):
        draw = rng(NUMBER, index, seed)
        case = {"job": asdict(drill.draw_job(draw)), "to": ["one", "all"][index % 2]}
        found.append(
            {**case, "rank": draw.randrange(drill.WORLD), "share": draw.random(), "skew": draw.random()}
        )
    return found


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """Signal while it trains, look, go on, compare."""
    job, first = Job(**case["job"]), case["rank"]
    ref = drill.reference(job)
    trace = ref.traces[first]
    times = {name: when for when, name in trace}
    begin, end = times["train from 0"], times[f"step {job.steps - 1}"]
    strike = drill.strike_at(trace, first, begin + case["share"] * (end - begin))
    try:
        output = _signal(job, scratch, strike, case["to"] == "all", 0.02 * case["skew"])
        step = _look(ref, scratch, output)
        found = drill.committed(scratch)
        drill.run_to_end(job, scratch, 1, str(found[step]))
        drill.check_same(ref, scratch, 2)
        drill.check_intact(ref, drill.committed(scratch))
    except AssertionError as error:
        return Outcome(drill.verdict_of(error), f"{error}\n{drill.outputs(scratch)}")
    return Outcome("ok", f"to {case['to']}: saved at step {step}")


def _signal(job: Job, folder: Path, strike: drill.Strike, everybody: bool, skew_s: float) -> str:
    """Runs the job into the signal; what it said."""
    with Crew(drill.WORLD, train, job, str(folder), 0, None, folder=folder / "out-0") as crew:
        events = folder / f"trace-0-{strike.rank}"
        crew.wait_until(lambda: count_trace(events) >= strike.events, drill.RUN_S)
        time.sleep(strike.after_s)
        crew.signal(signal.SIGTERM, strike.rank)
        if everybody:
            time.sleep(skew_s)
            crew.signal(signal.SIGTERM, *(rank for rank in range(drill.WORLD) if rank != strike.rank))
        if not crew.wait(drill.END_S + _SAVE_S):
            raise drill.Hang(f"{drill.END_S + _SAVE_S:g} s after SIGTERM: {crew.codes}\n{crew.output()}")
        if any(code is None or code < 0 for code in crew.codes) or len(set(crew.codes)) > 1:
            raise drill.Wrong(f"the ranks ended with {crew.codes}\n{crew.output()}")
        return crew.output()


def _look(ref: drill.Reference, folder: Path, output: str) -> int:
    """All ranks stopped at the same step, which is saved; the step."""
    traces = [read_trace(folder / f"trace-0-{rank}") for rank in range(drill.WORLD)]
    reached = {max(int(e.split()[1]) for _, e in trace if e.startswith("step ")) for trace in traces}
    found = drill.committed(folder)
    drill.check_intact(ref, found)
    if len(reached) != 1:
        raise drill.Wrong(f"the ranks stopped at the steps {sorted(reached)}")
    step = reached.pop()
    if step != max(found, default=0):
        raise drill.Lost(f"SIGTERM at step {step}, committed are {sorted(found)}")
    if f"SIGTERM: step {step} is saved as" not in output:
        raise drill.Wrong(f"nobody says that step {step} is saved\n{output}")
    return step
