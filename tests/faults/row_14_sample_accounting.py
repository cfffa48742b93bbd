"""Row 14: over random stops and resumes every sample is trained on exactly once an epoch.

What counts for the final weights: of each attempt the micro-batches up to the checkpoint that the next one goes on
from, and all of the last one. Every id of the data set must be in each epoch of that history exactly once, over the
data-parallel ranks, and equal on tensor-parallel ones. Stops come at random micro-batches, one to three of them;
every tenth case really kills a rank.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from neuron_lightning import checkpoint
from neuron_lightning.testing import RankFailure
from tests.faults import resume_ranks as ranks
from tests.faults.harness import Outcome, Pools, rng
from tests.faults.resume_ranks import MICRO_BATCHES, SAMPLES, Attempt, Setup

NUMBER = 14
TITLE = "sample accounting over random kills"
FULL = 200
SHARE = 8
EPOCHS = 3
KILLED_EVERY = 10
SOURCES = (
    *(
        f"neuron_lightning/{f}/*.py"
        for f in ("backends", "parallel", "checkpoint", "optim", "data", "lightning")
    ),
    "tests/faults/resume_ranks.py",
)


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """Random trainings with random stops; layouts and samplers in turn."""
    found = []
    for i in range(count):
        random = rng(NUMBER, i, seed)
        accumulate = random.choice((1, 1, 2, 4))
        last = EPOCHS * MICRO_BATCHES - 1
        stops = sorted(
            random.sample(range(1, last), 1 if i % KILLED_EVERY == KILLED_EVERY - 1 else random.randint(1, 3))
        )
        found.append(
            {
                "layout": list(ranks.STRATEGIES)[i % 3],
                "positional": i % 2 == 1,
                "accumulate": accumulate,
                "every": random.choice((1, 2, 3)),
                "manual": random.random() < 0.3,
                "shuffle": random.random() < 0.8,
                "workers": 2 if random.random() < 0.2 else 0,
                "stops": stops,
                "killer": random.randrange(2) if i % KILLED_EVERY == KILLED_EVERY - 1 else None,
            }
        )
    return found


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """Attempts until the end, then the account."""
    options = {key: value for key, value in case.items() if key not in ("stops", "killer")}
    setup = Setup(**options, dropout=False)
    steps = EPOCHS * MICRO_BATCHES // setup.accumulate
    resume, starts = None, [(0, 0)]
    for number, stop in enumerate([*case["stops"], None]):
        attempt = Attempt(number=number, steps=steps, resume=resume, stop_at=stop, killer=case["killer"])
        try:
            ended = pools.get(2).run(ranks.rank_trains, setup, str(scratch), attempt)
        except RankFailure as error:
            if stop is None or "died without a traceback" not in str(error):
                raise
            ended = [None, None]
        if (stop is None) != (None not in ended):
            return Outcome("wrong", f"attempt {number} with stop {stop} ended with {ended}")
        if stop is not None:
            resume = _newest(scratch / "ckpt")
            starts.append((number + 1, _step_of(resume)))
    problem = account(setup, scratch, starts)
    kind = "stopped" if case["killer"] is None else "killed"
    return Outcome("wrong", problem) if problem else Outcome("ok", kind)


def _newest(folder: Path) -> str | None:
    found = [info for info in checkpoint.list_checkpoints(folder) if "end-of" not in info.path]
    return found[-1].path if found else None


def _step_of(path: str | None) -> int:
    return 0 if path is None else int(checkpoint.read_trainer_state(path)["global_step"])


def account(setup: Setup, folder: Path, starts: list[tuple[int, int]]) -> str:
    """What is wrong with the samples that count; empty if nothing is.

    Args:
        setup: of the training.
        folder: holds the records.
        starts: (attempt, step that it went on from).
    """
    history = [_history(ranks.records(folder, rank), starts) for rank in range(2)]
    if setup.layout == "tp":
        if history[0] != history[1]:
            return "tensor-parallel ranks saw different samples"
        history.pop()
    for epoch in range(EPOCHS):
        seen = Counter(
            i for lines in history for line in lines if line["epoch"] == epoch for i in line["ids"]
        )
        if wrong := {i: seen[i] for i in range(SAMPLES) if seen[i] != 1} or set(seen) - set(range(SAMPLES)):
            return f"epoch {epoch}: times seen, by sample: {wrong}"
    return ""


def _history(lines: list[dict[str, Any]], starts: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """The lines that count: those before the step from which the next attempt goes on."""
    until = dict(starts)
    kept = [line for line in lines if line["step"] < until.get(line["attempt"] + 1, 1 << 30)]
    return [{**line, "attempt": 0} for line in kept]
