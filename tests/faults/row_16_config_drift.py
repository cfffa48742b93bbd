"""Row 16: a run that is configured otherwise than the one whose checkpoint it resumes says so: key, old and new value.

Each field that shapes a training is changed in turn, and the run resumed by its path and by ``auto_resume``. All ranks
must raise the same error before a step is made; the checkpoints stay, and the run with the old values goes on from them.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuron_lightning import checkpoint
from tests.faults import guard_ranks
from tests.faults.guard_ranks import Settings
from tests.faults.harness import Outcome, Pools
from tests.faults.resume_ranks import Setup

NUMBER = 16
TITLE = "config drift on resume"
STEPS = 4
FIELDS: dict[str, tuple[str, Any, str]] = {
    "vocab_size": ("vocab_size", 51, "vocab_size: 50 in the checkpoint, 51 now"),
    "seq_len": ("seq_len", 128, "hparams.seq_len: 64 in the checkpoint, 128 now"),
    "hyper-parameter": ("label_smoothing", 0.2, "hparams.label_smoothing: 0.1 in the checkpoint, 0.2 now"),
    "schedule": (
        "scheduler",
        "ExponentialLR",
        "scheduler.0.class: 'StepLR' in the checkpoint, 'ExponentialLR' now",
    ),
    "schedule's rate": ("gamma", 0.5, "scheduler.0.gamma: 0.9 in the checkpoint, 0.5 now"),
    "schedule's step": ("step_size", 5, "scheduler.0.step_size: 4 in the checkpoint, 5 now"),
    "learning rate": ("lr", 0.02, "optimizer.0.0.lr: 0.01 in the checkpoint, 0.02 now"),
    "weight decay": ("weight_decay", 0.0, "optimizer.0.0.weight_decay: 0.1 in the checkpoint, 0.0 now"),
    "betas": ("betas", (0.9, 0.99), "optimizer.0.0.betas: [0.9, 0.95] in the checkpoint, [0.9, 0.99] now"),
    "eps": ("eps", 1e-6, "optimizer.0.0.eps: 1e-08 in the checkpoint, 1e-06 now"),
    "seed": ("seed", 12, "seed: 11 in the checkpoint, 12 now"),
    "clipping": ("clip", 2.0, "gradient_clip_val: 1.0 in the checkpoint, 2.0 now"),
    "global batch": ("accumulate", 2, "global_batch_size: 4 in the checkpoint, 8 now"),
    "precision": ("precision", "bf16-true", "precision: 32-true in the checkpoint, bf16-true now"),
}
WAYS = ("path", "auto")
LAYOUTS = ("zero1", "tp")
FULL = len(FIELDS) * len(WAYS) * len(LAYOUTS)
SHARE = 4
SOURCES = (
    *(
        f"neuron_lightning/{f}/*.py"
        for f in ("backends", "parallel", "checkpoint", "optim", "data", "lightning")
    ),
    "tests/faults/resume_ranks.py",
    "tests/faults/guard_ranks.py",
)


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """Each field, by both ways, under two layouts; there is nothing random in it."""
    every = itertools.product(WAYS, LAYOUTS, FIELDS)
    return [{"field": field, "way": way, "layout": layout} for way, layout, field in every][:count]


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """Trains, changes a field, resumes; then resumes unchanged."""
    setup, pool = Setup(layout=case["layout"], every=2), pools.get(2)
    name, value, said = FIELDS[case["field"]]
    base, folder = Settings(), str(scratch)
    if pool.run(guard_ranks.rank_drifts, setup, folder, base, STEPS, None) != [("", STEPS)] * 2:
        return Outcome("wrong", "the first run did not end")
    newest = checkpoint.list_checkpoints(scratch / "ckpt")[-1]
    resume = "auto" if case["way"] == "auto" else newest.path
    changed = replace(base, **{name: value})
    outcomes = pool.run(guard_ranks.rank_drifts, setup, folder, changed, 2 * STEPS, resume)
    if len({message for message, _ in outcomes}) != 1 or said.replace("'", "") not in outcomes[0][0].replace(
        "'", ""
    ):
        return Outcome("silent" if not outcomes[0][0] else "wrong", f"{case}: {outcomes}")
    if checkpoint.list_checkpoints(scratch / "ckpt")[-1] != newest:
        return Outcome("wrong", f"{case}: the refused run saved something")
    if (again := pool.run(guard_ranks.rank_drifts, setup, folder, base, 2 * STEPS, resume)) != [
        ("", 2 * STEPS)
    ] * 2:
        return Outcome("wrong", f"{case}: the unchanged run does not go on: {again}")
    return Outcome("ok", case["way"])
