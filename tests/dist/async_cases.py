"""What each rank does in the tests of saving in the background."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from neuron_lightning.checkpoint import AsyncSaver, points
from neuron_lightning.errors import CheckpointError
from tests.devices import layout
from tests.dist.checkpoint_cases import make
from tests.leaks import held


def arguments(model: Any, optimizer: Any, step: int = 2) -> dict[str, Any]:
    return {
        "module_state": model.state_dict(),
        "parameters": dict(model.named_parameters()),
        "optimizers": [optimizer],
        "trainer_state": {"global_step": step},
        "rank_state": {"rank": dist.get_rank()},
    }


def save_while_training(path: str, tp: int, zero1: bool, kind: str) -> bool:
    """Saves after two steps; the steps after that, with their collectives, run while it is being written."""
    with layout(tp), contextlib.ExitStack() as stack:
        stack.callback(points.clear)
        model, optimizer = make(zero1, torch.float32, seed=0, steps=2)
        with AsyncSaver() as saver:
            points.on("share_opened", lambda: time.sleep(0.3))
            saver.save(path, **arguments(model, optimizer), state_dict_type=kind)
            model.train_steps(optimizer, 5)
            overlapped = saver.pending is not None
            saver.wait()
        return overlapped


def fail_on_one_rank(path: str, failing: int, budget: int | None) -> tuple[str, bool, list[str]]:
    """The error of a failed save, whether the next one worked, and what is left."""

    def full_disk() -> None:
        raise OSError(28, "No space left on device")

    with layout(2), contextlib.ExitStack() as stack:
        stack.callback(points.clear)
        model, optimizer = make(True, torch.float32, 0, 1)
        with AsyncSaver(memory_budget=budget if dist.get_rank() == failing else None) as saver:
            if dist.get_rank() == failing:
                points.on("share_opened", full_disk)
            saver.save(path, **arguments(model, optimizer))
            message = "no error"
            try:
                saver.wait()
            except CheckpointError as error:
                message = str(error)
            points.clear()
            dist.barrier()
            left = sorted(f.name for f in Path(path).parent.iterdir())
            dist.barrier()
            saver.save(path, **arguments(model, optimizer))
            saver.wait()
            return message, (Path(path) / "manifest.json").exists(), left


def fifty_saves(path: str) -> list[str]:
    """Files and threads that 50 saves have open and 10 had not."""
    with layout(2):
        model, optimizer = make(True, torch.float32, 0, 1)
        seen = []
        with AsyncSaver() as saver:
            for step in range(50):
                saver.save(path, **arguments(model, optimizer, step))
                model.train_steps(optimizer, 1)
                if step in (9, 49):
                    saver.wait()
                    seen.append(held())
        return sorted(seen[1] - seen[0])


def die_in_the_background(path: str, victim: int) -> str:
    """One rank is killed while it writes; what the others hear, and how soon."""
    with layout():
        model, optimizer = make(False, torch.float32, 0, 1)
        saver = AsyncSaver()
        if dist.get_rank() == victim:
            points.on("share_opened", lambda: os._exit(9))
        saver.save(path, **arguments(model, optimizer))
        started = time.monotonic()
        try:
            saver.wait()
        except CheckpointError as error:
            Path(f"{path}.heard-{dist.get_rank()}").write_text(f"{time.monotonic() - started:.1f} {error}")
        return "done"
