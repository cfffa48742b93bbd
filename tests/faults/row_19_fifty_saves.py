"""Fifty saves: memory, file descriptors, threads and temporary files stay where they were."""

from __future__ import annotations

import ctypes
import gc
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint import AsyncSaver
from neuron_lightning.optim import ParallelOptimizer
from neuron_lightning.parallel import parallel_state
from tests.faults import drill
from tests.faults.blocks import Block
from tests.faults.harness import Outcome, Pools

NUMBER, TITLE = 19, "50 saves: no growth"
FULL, SHARE = 1, 1
WORLD = 2
_SAVES = 50
_WARM = 10
"""Saves after which buffers and caches have their size."""
_KEEP = 2
_ELEMENTS = 1 << 17
_LEAK_BYTES = 2 << 20
"""A rank's share of a save is three times as much."""


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """One."""
    return [{"saves": _SAVES}][:count]


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """Fifty that block training, then fifty behind it, with retention."""
    details = []
    for asynchronous in (False, True):
        root = scratch / f"asynchronous-{asynchronous}"
        root.mkdir()
        said = pools.get(WORLD).run(
            save_often, str(root), case["saves"], asynchronous, timeout=4 * drill.RUN_S
        )
        for rank, (before, after) in enumerate(said):
            for name, value in after.items():
                if value > before[name] + (_LEAK_BYTES if name == "memory" else 0):
                    return Outcome(
                        "wrong", f"rank {rank}, asynchronous={asynchronous}: {name} {before} -> {after}"
                    )
        if sorted(path.name for path in root.iterdir()) != [f"step={case['saves'] - n}" for n in (1, 0)]:
            return Outcome("wrong", f"left in {root}: {sorted(path.name for path in root.iterdir())}")
        details.append(f"asynchronous={asynchronous} {said[0][0]} -> {said[0][1]}")
    return Outcome("ok", "; ".join(details))


def save_often(root: str, saves: int, asynchronous: bool) -> tuple[dict[str, int], dict[str, int]]:
    """On every rank: what is in use after some saves, and after all."""
    parallel_state.initialize_model_parallel(1)
    tempfile.tempdir = f"{root}-temporary"
    os.makedirs(tempfile.tempdir, exist_ok=True)
    saver = AsyncSaver() if asynchronous else None
    try:
        block = Block(0, _ELEMENTS)
        optimizer = ParallelOptimizer(torch.optim.AdamW(block.parameters(), foreach=False), zero1=True)
        sum(tensor.sum() for tensor in block.tensors).backward()
        optimizer.step()
        before: dict[str, int] = {}
        for step in range(1, saves + 1):
            _save(Path(root), step, block, optimizer, saver)
            if step == _WARM:
                before = _in_use(saver)
        return before, _in_use(saver)
    finally:
        tempfile.tempdir = None
        if saver is not None:
            saver.close()
        parallel_state.destroy_model_parallel()


def _save(root: Path, step: int, block: Block, optimizer: Any, saver: AsyncSaver | None) -> None:
    what = {**block.what(step), "optimizers": [optimizer]}

    def retain() -> None:
        if int(os.environ["RANK"]) == 0:
            checkpoint.remove_checkpoint(root / f"step={step - _KEEP}")

    if saver is None:
        checkpoint.write_checkpoint(root / f"step={step}", **what)
        retain()
    else:
        saver.save(root / f"step={step}", **what, on_commit=retain)


def _in_use(saver: AsyncSaver | None) -> dict[str, int]:
    if saver is not None:
        saver.wait()
    gc.collect()
    # The cpu backend keeps freed memory with the process: a warm rank's resident size moves by several MB without a leak.
    ctypes.CDLL(None).malloc_trim(0)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "memory": resident,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "python threads": threading.active_count(),
        "temporary files": len(os.listdir(tempfile.gettempdir())),
    }
