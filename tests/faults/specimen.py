"""Two small checkpoints with every kind of file, for tests that damage or poison copies of them."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuron_lightning import checkpoint
from neuron_lightning.errors import CheckpointError
from neuron_lightning.optim import ParallelOptimizer
from tests.faults import reshard_ranks
from tests.faults.harness import Pools
from tests.faults.reshard_ranks import Layout

OLD, NEW = "step=3.ckpt", "step=6.ckpt"
STEPS = {OLD: 3, NEW: 6}
LAYOUT = Layout(1, 2, True, False)


def rank_writes(folder: str) -> None:
    """Trains a module of plain layers under ZeRO-1 and saves it twice, tensors in trainer and rank state included."""
    with reshard_ranks.laid_out(LAYOUT):
        model, optimizer = reshard_ranks.build("plain64", LAYOUT, seed=0)
        for name, step in STEPS.items():
            reshard_ranks.train("plain64", model, optimizer, step - 3, 3)
            model.get_buffer("shift").add_(step)  # which is all that rank 0's file of weights holds
            _save(f"{folder}/{name}", step, model, optimizer)


def _save(path: str, step: int, model: nn.Module, optimizer: ParallelOptimizer) -> None:
    rank = dist.get_rank()
    callbacks = {"metric": torch.full((3,), float(step)), "path": Path("a/b"), "best": None}
    checkpoint.write_checkpoint(
        path,
        module_state=model.state_dict(),
        parameters=dict(model.named_parameters()),
        optimizers=[optimizer],
        trainer_state={
            "global_step": step,
            "epoch": step // 2,
            "data_position": {"samples": 16 * step},
            "callbacks": callbacks,
            "optimizer_states": [],
        },
        rank_state={"rank": rank, "draws": torch.arange(step * 2) + rank, "step": step},
    )


@functools.cache
def originals(pools: Pools) -> Path:
    """A folder with the two checkpoints, written once in this process by two ranks; to be read only."""
    folder = Path(tempfile.mkdtemp(prefix="neuron-lightning-specimen-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pools.get(2).run(rank_writes, str(folder))
    return folder


def copies(pools: Pools, scratch: Path) -> Path:
    """The two checkpoints, to be damaged, in ``scratch / "run"``."""
    shutil.copytree(originals(pools), scratch / "run")
    return scratch / "run"


def files(pools: Pools) -> list[str]:
    """Names of the files of a checkpoint; the same for both."""
    return sorted(path.name for path in (originals(pools) / NEW).iterdir())


class Reader:
    """A module and an optimizer of one process into which checkpoints are loaded, again and again."""

    def __init__(self) -> None:
        self.model, self.optimizer = reshard_ranks.build("plain64", Layout(1, 1, False, False), seed=5)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By name."""
        return dict(self.model.named_parameters())

    def weights(self) -> dict[str, Tensor]:
        """Copies of all weights and buffers."""
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def attempts(self, path: Path) -> dict[str, str]:
        """Tries everything that a resume reads. Returns the error of each part that refused, by part."""
        refused = {}
        for part, work in self._parts(path).items():
            try:
                work()
            except CheckpointError as error:
                refused[part] = str(error)
        return refused

    def contents(self) -> dict[str, Tensor]:
        """Copies of all weights, buffers and optimizer state."""
        return {**self.weights(), **_contents(self.optimizer)}

    def _parts(self, path: Path) -> dict[str, Any]:
        model, optimizer, named = self.model, self.optimizer, self.parameters
        return {
            "weights": lambda: checkpoint.load_module_state(path, model.state_dict(), named),
            "optimizer": lambda: checkpoint.load_optimizer_state(path, [optimizer], named),
            "trainer": lambda: checkpoint.read_trainer_state(path),
            "rank 0": lambda: checkpoint.read_rank_state(path, 0),
            "rank 1": lambda: checkpoint.read_rank_state(path, 1),
            "export": lambda: checkpoint.read_full_state(path),
        }


def verify(path: Path) -> str:
    """The error of a verification of every file; empty if there is none."""
    try:
        checkpoint.verify_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    return ""


def _contents(optimizer: ParallelOptimizer) -> dict[str, Tensor]:
    pieces = enumerate(optimizer.export_state())
    return {f"{i}/{key}": t.clone() for i, piece in pieces for key, t in piece.tensors.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@functools.cache
def expected(pools: Pools, name: str) -> dict[str, Tensor]:
    """What an undamaged specimen holds, as a reader of its own reads it."""
    fresh = Reader()
    if refused := fresh.attempts(originals(pools) / name):
        raise AssertionError(refused)
    return fresh.contents()


@functools.cache
def reader() -> Reader:
    """The one of this process."""
    return Reader()
