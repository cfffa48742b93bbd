"""What an interrupted save left under the same name is cleared up; the next save of all ranks works."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint import AsyncSaver
from neuron_lightning.parallel import parallel_state
from tests.faults import drill
from tests.faults.blocks import Block, check_steps
from tests.faults.harness import Outcome, Pools, rng

NUMBER, TITLE = 12, "leftovers of the same step; second job"
FULL, SHARE = 50, 5
WORLD = 2
_KINDS = ("part of a save", "whole save without its name", "junk", "link", "file", "removal", "replacement")


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """Several leftovers at once."""
    found = []
    for index in range(count):
        draw = rng(NUMBER, index, seed)
        kinds = [_KINDS[index % len(_KINDS)], *draw.sample(["removal", "replacement"], draw.randrange(3))]
        case = {"kinds": list(dict.fromkeys(kinds)), "there": draw.random() < 0.5, "draw": draw.random()}
        found.append({**case, "asynchronous": draw.random() < 0.5})
    return found


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """Leaves things there, then saves step 2 on all ranks."""
    root, outside = scratch / "root", scratch / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "precious").write_text("x")
    pool = pools.get(WORLD)
    pool.run(save_on, str(root / "step=2"), 1, False, timeout=drill.RUN_S)
    for kind in case["kinds"]:
        _leave(kind, root / "step=2", outside, random.Random(case["draw"]))
    if not case["there"]:
        shutil.rmtree(root / "step=2")
    pool.run(save_on, str(root / "step=2"), 2, case["asynchronous"], timeout=drill.RUN_S)
    try:
        steps = check_steps(root)
    except AssertionError as error:
        return Outcome(drill.verdict_of(error), str(error))
    if steps != [2]:
        return Outcome("lost", f"step 2 was saved over {case['kinds']}, {steps} are there")
    if sorted(path.name for path in root.iterdir()) != ["step=2"]:
        return Outcome("wrong", f"left in the folder: {sorted(path.name for path in root.iterdir())}")
    if (outside / "precious").read_text() != "x":
        return Outcome("lost", "a file outside was deleted through a link")
    return Outcome("ok", f"{case['kinds'][0]}: cleared")


def save_on(path: str, step: int, asynchronous: bool) -> None:
    """On every rank."""
    parallel_state.initialize_model_parallel(1)
    try:
        if not asynchronous:
            checkpoint.write_checkpoint(path, **Block(step).what(step))
            return
        with AsyncSaver() as saver:
            saver.save(path, **Block(step).what(step))
            saver.wait()
    finally:
        parallel_state.destroy_model_parallel()


def _leave(kind: str, target: Path, outside: Path, draw: random.Random) -> None:
    """Puts what a crash may leave beside ``target``, which is a whole checkpoint."""
    partial = target.with_name(f"{target.name}.tmp")
    if kind == "removal":
        grave = Path(shutil.copytree(target, target.with_name(f"{target.name}.removed")))
        next(grave.glob("*.safetensors")).unlink()
    elif kind == "replacement":
        shutil.copytree(target, target.with_name(f"{target.name}.old"))
    elif kind == "file":
        partial.write_text("not a folder")
    elif kind == "link":
        partial.symlink_to(outside)
    elif kind == "junk":
        (partial / "sub" / "folder").mkdir(parents=True)
        (partial / "sub" / "folder" / "file").write_bytes(bytes(1000))
        (partial / "link").symlink_to(outside)
    else:
        shutil.copytree(target, partial)
        if kind == "part of a save":
            (partial / "manifest.json").unlink()
            for path in sorted(partial.iterdir()):
                os.truncate(path, draw.randrange(path.stat().st_size))
                path.chmod(0o400)
            partial.chmod(0o500)
