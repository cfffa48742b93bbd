"""The training job that is killed: a small model under the Trainer, traced, and equal to itself bit by bit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from neuron_lightning import NeuronCheckpointIO, NeuronModelCheckpoint, NeuronXLAStrategy
from neuron_lightning.checkpoint import points
from neuron_lightning.parallel import ColumnParallelLinear, RowParallelLinear
from tests.faults.crew import Trace

WIDTH = 64
SAMPLES = 64


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of two ranks.

    Attributes:
        tp: tensor-parallel size; the other ranks are data parallel.
        precision: of the Trainer.
        accumulate: batches of a step.
        steps: optimizer steps in all.
        interval: steps between saves.
        keep: checkpoints that are kept; -1 for all, 0 for one whose name is reused by every save.
        asynchronous: saves go on behind the training.
        ours: NeuronModelCheckpoint saves, not Lightning's own callback.
        auto_resume: the strategy finds the checkpoint to go on from.
    """

    tp: int = 1
    precision: str = "32-true"
    accumulate: int = 1
    steps: int = 12
    interval: int = 3
    keep: int = -1
    asynchronous: bool = False
    ours: bool = False
    auto_resume: bool = False

    def changed(self, **values: Any) -> Job:
        """This job with other values."""
        return replace(self, **values)

    @property
    def key(self) -> str:
        """A name of its own."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


class Tiny(LightningModule):
    """Parallel layers, dropout, a schedule."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job
        self.up: Any = None
        self.down: Any = None

    def configure_model(self) -> None:
        """Layers are drawn when the layout is known."""
        if self.up is None:
            self.up = ColumnParallelLinear(WIDTH, 4 * WIDTH, gather_output=False)
            self.down = RowParallelLinear(4 * WIDTH, WIDTH, input_is_parallel=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean squared error of a noisy input."""
        x, y = (part.to(self.up.weight.dtype) for part in batch)
        x = torch.nn.functional.dropout(x, 0.2)
        return (self.down(torch.nn.functional.gelu(self.up(x))) - y).square().mean()

    def configure_optimizers(self) -> Any:
        """AdamW with a learning rate that changes."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Watcher(Callback):
    """Traces steps, and keeps loss and gradient norm of every batch as exact numbers."""

    def __init__(self, trace: Trace, numbers: Path) -> None:
        self._trace = trace
        self._numbers = os.open(numbers, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where this attempt goes on."""
        self._step = trainer.global_step
        self._trace.mark(f"train from {trainer.global_step}")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A batch begins."""
        self._trace.mark(f"batch {trainer.current_epoch} {batch_idx}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One line of numbers a batch, before any save of it."""
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        norm = trainer.strategy.optimizers[0].grad_norm if stepped else None  # type: ignore[attr-defined]
        line = {
            "batch": f"{trainer.current_epoch}/{batch_idx}",
            "step": trainer.global_step,
            "loss": float(outputs["loss"]).hex(),
            "norm": float(norm).hex() if norm is not None else None,
        }
        os.write(self._numbers, (json.dumps(line) + "\n").encode())
        self._trace.mark(f"step {trainer.global_step}")


class TracedRemoval(NeuronCheckpointIO):
    """Marks removals in the trace."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def remove_checkpoint(self, path: Any) -> None:
        """As the plugin does."""
        self._trace.mark("remove")
        super().remove_checkpoint(path)
        self._trace.mark("removed")


class TracedStrategy(NeuronXLAStrategy):
    """Marks loads and saves in the trace."""

    trace: Trace

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the strategy does."""
        self.trace.mark("restore")
        return super().load_checkpoint(*args, **kwargs)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As the strategy does."""
        self.trace.mark("save")
        super().save_checkpoint(*args, **kwargs)
        self.trace.mark("save returns")


def loader(job: Job, world_size: int) -> DataLoader[Any]:
    """Shuffled; eight batches an epoch."""
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(SAMPLES, WIDTH, generator=generator) for _ in range(2))
    return DataLoader(TensorDataset(x, y), batch_size=8 // (world_size // job.tp), shuffle=True)


def saver(job: Job, folder: Path) -> ModelCheckpoint:
    """The callback for what the job keeps."""
    common: dict[str, Any] = {
        "dirpath": folder,
        "every_n_train_steps": job.interval,
        "enable_version_counter": False,
        "filename": "newest" if job.keep == 0 else "{step}",
        "save_top_k": job.keep or 1,
    }
    if job.ours:
        return NeuronModelCheckpoint(**common)
    if job.keep > 0:
        return ModelCheckpoint(monitor="step", mode="max", **common)
    return ModelCheckpoint(**common)


def train(
    job: Job,
    folder: str,
    attempt: int,
    resume: str | None,
    more: Callable[[Job, Trace, Path], list[Callback]] | None = None,
) -> None:
    """One attempt on this rank; what it saw lies in ``folder``, its checkpoints in ``folder/ckpt``.

    Args:
        job: what to train.
        folder: shared by all attempts.
        attempt: names the files of this one.
        resume: checkpoint to go on from; not looked at under ``auto_resume``.
        more: makes further callbacks; may register points.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    base = Path(folder)
    trace = Trace(base / f"trace-{attempt}-{rank}")
    trace.mark("start")
    for name in points.NAMES:
        points.on(name, lambda name=name: trace.mark(name))
    extra = more(job, trace, base) if more is not None else []
    seed_everything(11, verbose=False)
    module = Tiny(job)
    strategy = TracedStrategy(
        tensor_parallel_size=job.tp,
        zero1=True,
        async_save=job.asynchronous,
        auto_resume=job.auto_resume,
        checkpoint_io=TracedRemoval(trace),
    )
    strategy.trace = trace
    watcher = Watcher(trace, base / f"numbers-{attempt}-{rank}")
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        precision=job.precision,  # type: ignore[arg-type]
        max_steps=job.steps,
        accumulate_grad_batches=job.accumulate,
        callbacks=[watcher, *extra, saver(job, base / "ckpt")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(job, world), ckpt_path=None if job.auto_resume else resume)
    trace.mark("fitted")
    (base / f"result-{attempt}-{rank}").write_text(_digest(module, strategy))
    trace.mark("end")


def _digest(module: LightningModule, strategy: NeuronXLAStrategy) -> str:
    """Hash of this rank's parameters and of all its optimizer state."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(name.encode() + _bytes(parameter))
    for optimizer in strategy.optimizers:
        for piece in optimizer.export_state():  # type: ignore[attr-defined]
            digest.update(json.dumps([piece.start, piece.stop, piece.scalars]).encode())
            for key, tensor in sorted(piece.tensors.items()):
                digest.update(key.encode() + _bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
