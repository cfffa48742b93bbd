"""The disk is full on rank 0, on another, on all: one outcome, nothing lost, and the next save works when it is not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint import AsyncSaver, points
from neuron_lightning.errors import CheckpointError
from neuron_lightning.parallel import parallel_state
from tests.faults import disks, drill
from tests.faults.blocks import Block, check_steps
from tests.faults.harness import Outcome, Pools, Unavailable, rng

NUMBER, TITLE = 11, "disk full on rank 0, another, all"
FULL, SHARE = 30, 6
WORLD = 2
_DISK_BYTES = 4 << 20
_LIMIT_BYTES = 4096
_MOMENTS = ("rank 0", "rank 1", "all", "manifest")
_PATIENCE_S = 20.0


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """Who has no space, for a new name or a replaced one, with training blocked or not."""
    found = []
    for index in range(count):
        draw = rng(NUMBER, index, seed)
        found.append(
            {
                "who": _MOMENTS[index % len(_MOMENTS)],
                "replace": draw.random() < 0.5,
                "asynchronous": draw.random() < 0.5,
                "kind": draw.choice(["deduped", "sharded"]),
            }
        )
    return found


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """On a small disk of our own; where that cannot be had, a limit on the size of files stands in for it."""
    try:
        with disks.small_disk(scratch / "disk", _DISK_BYTES) as disk:
            return _run(case, disk, scratch, pools, "full disk")
    except Unavailable as reason:
        if case["who"] == "manifest":
            raise
        print(f"row {NUMBER}: a limit on the size of files stands in for a full disk: {reason}")
        (scratch / "folder").mkdir()
        return _run(case, scratch / "folder", scratch, pools, "file limit")


def _run(case: dict[str, Any], root: Path, scratch: Path, pools: Pools, how: str) -> Outcome:
    said = pools.get(WORLD).run(save_three_times, case, str(root), str(scratch), how, timeout=drill.RUN_S)
    errors = {message for message, _ in said}
    if len(errors) != 1:
        return Outcome("wrong", f"the ranks disagree: {errors}")
    message = errors.pop()
    expected = "No space left" if how == "full disk" else "File too large"
    if expected not in message:
        return Outcome("silent", f"the save into a {how} said {message!r}")
    for _, between in said:
        if between != [1]:
            return Outcome("lost", f"after the failed save the steps {between} are there, not [1]")
    after = check_steps(root)
    if after != ([3] if case["replace"] else [1, 3]):
        return Outcome("lost", f"after the next save the steps {after} are there")
    if left := {path.name for path in root.iterdir()} - {"newest", "step=1", "step=3"}:
        return Outcome("wrong", f"left in the folder: {left}")
    return Outcome("ok", f"{how}, {case['who']}: {message[-80:]}")


def save_three_times(case: dict[str, Any], root: str, scratch: str, how: str) -> tuple[str, list[int]]:
    """On every rank: a save that works, one without space, one that works. The error, and the steps after it."""
    parallel_state.initialize_model_parallel(1)
    saver = AsyncSaver() if case["asynchronous"] else None
    block = Block(1)

    def save(step: int) -> None:
        block.become(step)
        path = Path(root) / ("newest" if case["replace"] else f"step={step}")
        what = {**block.what(step), "state_dict_type": case["kind"]}
        if saver is None:
            checkpoint.write_checkpoint(path, **what)
        else:
            saver.save(path, **what)
            saver.wait()

    try:
        save(1)
        dist.barrier()
        message = _without_space(lambda: save(2), case["who"], Path(root), Path(scratch), how)
        dist.barrier()
        between = check_steps(Path(root), alone=True)
        dist.barrier()
        save(3)
        return message, between
    finally:
        points.clear()
        if saver is not None:
            saver.close()
        parallel_state.destroy_model_parallel()


def _without_space(save: Callable[[], None], who: str, root: Path, scratch: Path, how: str) -> str:
    """Runs ``save`` while the disk is full for ``who``; what it raised."""
    rank = dist.get_rank()
    mine = who in ("all", f"rank {rank}") or (who == "manifest" and rank == 0)
    trigger = {"manifest": "gathered", "all": "prepared"}.get(who, "share_opened")
    ballast = root / "ballast"

    def last_to_write() -> None:
        if who.startswith("rank"):
            _others_done(scratch)
        if not ballast.exists():
            disks.fill(root)

    if who.startswith("rank"):
        points.on("share_synced", lambda: (scratch / f"done-{rank}").touch())
    if how == "full disk":
        if mine:
            points.on(trigger, last_to_write)
        return _error_of(save, ballast)
    if not mine:
        return _error_of(save, ballast)
    with disks.file_limit(_LIMIT_BYTES):
        return _error_of(save, ballast)


def _error_of(save: Callable[[], None], ballast: Path) -> str:
    try:
        save()
        return "nothing"
    except CheckpointError as error:
        return str(error)
    finally:
        points.clear()
        dist.barrier()
        if dist.get_rank() == 0:
            ballast.unlink(missing_ok=True)


def _others_done(scratch: Path) -> None:
    """Waits until all other ranks have made their shares durable: they needed the space that is taken now."""
    deadline = time.monotonic() + _PATIENCE_S
    others = [scratch / f"done-{rank}" for rank in range(WORLD) if rank != dist.get_rank()]
    while time.monotonic() < deadline and not all(path.exists() for path in others):
        time.sleep(0.001)
    if not all(path.exists() for path in others):
        raise OSError(f"process {os.getpid()}: the other ranks did not write")
