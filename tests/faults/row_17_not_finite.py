"""Row 17: NaN or infinity on one rank: all ranks decide the same, and no checkpoint that holds it is committed.

It appears in the input, a gradient, a weight, an Adam moment or a master weight of one rank, at a random step and place.
Every rank must end with the same error, which names the tensor; every committed checkpoint is finite, and the newest of
them is the last before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint.reader import Checkpoint
from tests.faults import guard_ranks
from tests.faults.guard_ranks import PLACES, Poison
from tests.faults.harness import Outcome, Pools, rng
from tests.faults.resume_ranks import STRATEGIES, Setup

NUMBER = 17
TITLE = "NaN/Inf on one rank"
FULL = 100
SHARE = 6
STEPS = 12
SOURCES = (
    *(
        f"neuron_lightning/{f}/*.py"
        for f in ("backends", "parallel", "checkpoint", "optim", "data", "lightning")
    ),
    "tests/faults/resume_ranks.py",
    "tests/faults/guard_ranks.py",
)


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """Places in turn, the rest at random; a master weight needs a narrow precision and ZeRO-1."""
    found = []
    for i in range(count):
        random, place = rng(NUMBER, i, seed), PLACES[i % len(PLACES)]
        poison = {
            "place": place,
            "value": random.choice(("nan", "inf", "-inf")),
            "rank": random.randrange(2),
            "step": random.randrange(1, STEPS - 4),
            "element": random.random(),
        }
        layout = random.choice([n for n in STRATEGIES if n == "zero1" or place != "master"])
        precision = "bf16-true" if place == "master" else random.choice(("32-true", "32-true", "bf16-true"))
        case = {"layout": layout, "precision": precision, "every": random.choice((1, 2, 3)), "poison": poison}
        found.append(case)
    return found


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """Trains until it is refused, and looks at what was saved."""
    poison = Poison(**case["poison"])
    setup = Setup(layout=case["layout"], every=case["every"], dropout=False)
    messages = pools.get(2).run(
        guard_ranks.rank_blows_up, setup, str(scratch), poison, case["precision"], STEPS
    )
    if not all(messages):
        return Outcome("silent", f"{case}: {messages}")
    if messages[0] != messages[1]:
        return Outcome("wrong", f"{case}: the ranks differ: {messages}")
    if "NaN or infinite" not in messages[0]:
        return Outcome("wrong", f"{case}: {messages[0]}")
    steps = []
    for info in checkpoint.list_checkpoints(scratch / "ckpt"):
        if name := _not_finite(info.path):
            return Outcome("silent", f"{case}: {info.path} holds {name}")
        steps.append(info.step or 0)
    if max(steps, default=0) > poison.step:
        return Outcome("wrong", f"{case}: saved at steps {steps}")
    return Outcome("ok", poison.place)


def _not_finite(path: str) -> str:
    opened = Checkpoint(Path(path))
    names = [name for name in opened.manifest.tensors if name.startswith(("model/", "optimizer"))]
    return next((name for name in names if not torch.isfinite(opened.read_tensor(name)).all()), "")
