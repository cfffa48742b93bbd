"""Row 13: a run that stops and resumes takes, bit for bit, the steps of one that never stopped.

Stops: in the middle of an epoch, after the last batch of one (before its end is counted), at the boundary of two, after
``fit`` has ended (and is to go on for longer), and inside an accumulation window, which is then replayed from its
start. All against accumulation 1 and 4, shuffling, random numbers in the step, loader workers, layouts, and both kinds
of optimization. Compared on every rank: sample ids, loss and learning rate of every micro-batch, gradient norm of every
step, and at the end a hash of weights and optimizer state.
"""

from __future__ import annotations

import functools
import itertools
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from neuron_lightning import checkpoint
from tests.faults import resume_ranks as ranks
from tests.faults.harness import Outcome, Pools
from tests.faults.resume_ranks import MICRO_BATCHES, Attempt, Setup

NUMBER = 13
TITLE = "resume grid, bit-identical"
STOPS = ("middle", "last batch", "boundary", "after fit", "window")
EPOCHS = 2
SOURCES = (
    *(
        f"neuron_lightning/{f}/*.py"
        for f in ("backends", "parallel", "checkpoint", "optim", "data", "lightning")
    ),
    "tests/faults/resume_ranks.py",
)


def _grid() -> list[dict[str, Any]]:
    keys = ("stop", "accumulate", "shuffle", "dropout", "workers", "layout", "manual")
    switch = (False, True)
    values = itertools.product(STOPS, (1, 4), switch, switch, (0, 2), ranks.STRATEGIES, switch)
    cells = [dict(zip(keys, cell, strict=True)) for cell in values]
    return [cell for cell in cells if cell["accumulate"] > 1 or cell["stop"] != "window"]


FULL = len(_grid())
SHARE = 12


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """The whole grid; the first ones hold every stop, layout and value."""
    grid = _grid()
    random.Random(seed).shuffle(grid)
    return [*_share(), *(cell for cell in grid if cell not in _share())][:count]


def _share() -> list[dict[str, Any]]:
    """Twelve cells: every stop at least twice, every layout with every kind of optimization twice."""
    cells = []
    for i in range(SHARE):
        stop = STOPS[i % 5]
        cells.append(
            {
                "stop": stop,
                "accumulate": 4 if stop == "window" or i % 2 else 1,
                "shuffle": i % 4 != 3,
                "dropout": i % 3 != 2,
                "workers": 2 if i in (0, 4, 8) else 0,
                "layout": list(ranks.STRATEGIES)[i % 3],
                "manual": i % 4 in (1, 2),
            }
        )
    return cells


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """Stops, resumes, and compares with the uninterrupted run."""
    stop = case["stop"]
    options = {key: value for key, value in case.items() if key != "stop"}
    setup = Setup(**options, every=4 // case["accumulate"])
    steps = EPOCHS * MICRO_BATCHES // setup.accumulate
    (whole, digests), pool = _whole(setup.changed(workers=0, every=0), pools), pools.get(2)
    ended = steps // 2 + 1
    after = str(scratch / "after.ckpt")
    first = Attempt(number=0, steps=steps, stop_at=_stop_at(stop, setup))
    if stop == "after fit":
        first = Attempt(number=0, steps=ended, after=after)
    if (stopped := pool.run(ranks.rank_trains, setup, str(scratch), first)) != [
        None
    ] * 2 and stop != "after fit":
        return Outcome("wrong", f"the run was not stopped: {stopped}")
    path = after if stop == "after fit" else _newest(scratch / "ckpt", stop)
    second = Attempt(number=1, steps=steps, resume=path)
    resumed = pool.run(ranks.rank_trains, setup, str(scratch), second)
    for rank in range(2):
        if problem := _difference(ranks.records(scratch, rank), whole[rank]):
            return Outcome("wrong", f"rank {rank}, resumed from {path}: {problem}")
    if resumed != digests:
        return Outcome("wrong", "all steps are equal, but not the final state")
    return Outcome("ok", stop)


def _stop_at(stop: str, setup: Setup) -> int:
    """The micro-batch before which the first attempt stops, in the second epoch but for the boundary."""
    second = MICRO_BATCHES
    if stop == "window":
        return second + setup.accumulate + 2
    return second + 9 - setup.accumulate // 4 if stop == "middle" else second


def _newest(folder: Path, stop: str) -> str:
    """The checkpoint to go on from: of the epoch's end at its boundary, else of the last step."""
    names = [Path(info.path) for info in checkpoint.list_checkpoints(folder)]
    of_epochs = [path for path in names if path.name.startswith("end-of-")]
    return str(of_epochs[-1] if stop == "boundary" else [path for path in names if path not in of_epochs][-1])


def _difference(lines: list[dict[str, Any]], whole: list[dict[str, Any]]) -> str:
    """The first micro-batch of any attempt that is not that of the whole run; empty if there is none."""
    expected = {(line["epoch"], line["batch"]): {**line, "attempt": 0} for line in whole}
    for line in lines:
        if {**line, "attempt": 0} != expected.get((line["epoch"], line["batch"])):
            return f"{line} is not {expected.get((line['epoch'], line['batch']))}"
    resumed = [line for line in lines if line["attempt"] == 1]
    if not resumed:
        return "the resumed run made no step"
    first = min((line["epoch"], line["batch"]) for line in resumed)
    missing = [
        key for key in expected if key >= first and key not in {(r["epoch"], r["batch"]) for r in resumed}
    ]
    return f"the resumed run left out {missing[:5]}" if missing else ""


@functools.cache
def _whole(setup: Setup, pools: Pools) -> tuple[list[list[dict[str, Any]]], list[str | None]]:
    """Records and digests of the uninterrupted run, which neither saves nor has workers: both must change nothing."""
    folder = Path(tempfile.mkdtemp(prefix="neuron-lightning-whole-"))
    try:
        steps = EPOCHS * MICRO_BATCHES // setup.accumulate
        digests = pools.get(2).run(ranks.rank_trains, setup, str(folder), Attempt(number=0, steps=steps))
        return [ranks.records(folder, rank) for rank in range(2)], digests
    finally:
        shutil.rmtree(folder, ignore_errors=True)
