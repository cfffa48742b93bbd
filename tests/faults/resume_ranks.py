"""A training that is stopped somewhere and goes on: what one rank of it does, and the record that it keeps.

Every micro-batch leaves one line in a file of its rank: which samples, and after the optimizer step loss and gradient
norm as exact numbers. A stop raises in the loop or kills the process; the record is on disk by then.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from neuron_lightning import NeuronXLAStrategy, parallel_state
from neuron_lightning.data.sampler import PositionalSampler
from neuron_lightning.parallel import ColumnParallelLinear, RowParallelLinear, mesh
from neuron_lightning.parallel.random import get_rng_tracker

SAMPLES, BATCH = 48, 4
MICRO_BATCHES = SAMPLES // BATCH
"""Of an epoch, under every layout."""
WIDTH = 8
STRATEGIES: dict[str, dict[str, Any]] = {
    "dp": {"zero1": False},
    "tp": {"tensor_parallel_size": 2, "zero1": False},
    "zero1": {"zero1": True},
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A training of two ranks.

    Attributes:
        layout: key of :data:`STRATEGIES`.
        accumulate: micro-batches of a step.
        shuffle, workers: of the loader.
        dropout: whether a step draws random numbers: inside and outside tensor-parallel regions, of torch, numpy, Python.
        manual: manual optimization, accumulation by hand.
        positional: a positional sampler of ours; otherwise a plain DataLoader, whose sampler Lightning replaces.
        every: steps between checkpoints; 0: none at all.
    """

    layout: str = "dp"
    accumulate: int = 1
    shuffle: bool = True
    workers: int = 0
    dropout: bool = True
    manual: bool = False
    positional: bool = False
    every: int = 1

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in asdict(self).items())

    def changed(self, **values: Any) -> Setup:
        """This one with other values."""
        return replace(self, **values)


class Stopped(Exception):
    """The end of an attempt that is stopped without a kill."""


class Numbered(Dataset[Any]):
    """Samples that know their number."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(SAMPLES, WIDTH, generator=generator)
        self.y = torch.randn(SAMPLES, WIDTH, generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.x[index], self.y[index], index


class Noisy(LightningModule):
    """Two parallel layers and a schedule; automatic or manual optimization."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup_, self.automatic_optimization = setup, not setup.manual
        self.up: Any = None
        self.down: Any = None

    def configure_model(self) -> None:
        """Layers are drawn when the layout is known."""
        if self.up is None:
            self.up = ColumnParallelLinear(WIDTH, 4 * WIDTH, gather_output=False)
            self.down = RowParallelLinear(4 * WIDTH, WIDTH, input_is_parallel=True)

    def _loss(self, batch: Any) -> Tensor:
        x, y, _ = batch
        if not self.setup_.dropout:
            return (self.down(torch.tanh(self.up(x))) - y).square().mean()
        x = torch.nn.functional.dropout(x, 0.2) * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))
        hidden = torch.tanh(self.up(x))
        with get_rng_tracker().fork():
            hidden = torch.nn.functional.dropout(hidden, 0.2)
        return (self.down(hidden) - y).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One micro-batch."""
        loss = self._loss(batch)
        if self.setup_.manual:
            self.manual_backward(loss / self.setup_.accumulate)
            if (batch_idx + 1) % self.setup_.accumulate == 0:
                optimizer, schedule = self.optimizers(), self.lr_schedulers()
                optimizer.step()  # type: ignore[union-attr]
                optimizer.zero_grad()  # type: ignore[union-attr]
                schedule.step()  # type: ignore[union-attr, call-arg]
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW with a rate that changes at every step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Recorder(Callback):
    """Keeps the record, and stops the attempt.

    Args:
        path: file of this rank; appended to.
        attempt: number of this attempt.
        stop_at: micro-batch, counted over epochs, before which it stops; None: never.
        kills: whether this rank kills itself then.
    """

    def __init__(self, path: Path, attempt: int, stop_at: int | None, kills: bool) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._attempt, self._stop_at, self._kills = attempt, stop_at, kills
        self._step = -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Stops here, or remembers the step count."""
        if self._stop_at == trainer.current_epoch * MICRO_BATCHES + batch_idx:
            if self._kills:
                os.kill(os.getpid(), 9)
            raise Stopped
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One line."""
        stepped = trainer.global_step != self._step
        norm = trainer.strategy.optimizers[0].grad_norm if stepped else None  # type: ignore[attr-defined]
        line = {
            "attempt": self._attempt,
            "epoch": trainer.current_epoch,
            "batch": batch_idx,
            "step": self._step,
            "ids": batch[2].tolist(),
            "loss": float(outputs["loss"]).hex(),
            "norm": None if norm is None else float(norm).hex(),
            "lr": float(trainer.strategy.optimizers[0].param_groups[0]["lr"]).hex(),
        }
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt of a training.

    Attributes:
        number: of the attempt.
        steps: where the training ends.
        resume: checkpoint to go on from.
        stop_at: micro-batch before which it stops.
        killer: rank that kills itself there; None: all ranks raise.
        after: where to save once the training has ended.
    """

    number: int
    steps: int
    resume: str | None = None
    stop_at: int | None = None
    killer: int | None = None
    after: str | None = None


def rank_trains(setup: Setup, folder: str, attempt: Attempt) -> str | None:
    """Runs one attempt. Returns the digest of all that this rank holds at the end; None if it was stopped."""
    rank = int(os.environ["RANK"])
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # it has loader workers
    gc.collect()  # process groups of earlier attempts, lest a forked worker frees them without their threads
    seed_everything(11, verbose=False)
    strategy = NeuronXLAStrategy(**STRATEGIES[setup.layout])
    stops = attempt.killer is None or attempt.killer == rank
    recorder = Recorder(
        Path(folder) / f"record-{rank}",
        attempt.number,
        attempt.stop_at if stops else None,
        attempt.killer == rank,
    )
    trainer = make_trainer(setup, strategy, folder, attempt.steps, [recorder])
    module = Noisy(setup)
    if attempt.number:  # the resume, and nothing else, must bring random states back
        torch.rand(3), np.random.rand(3), random.random()
    try:
        trainer.fit(module, make_loader(setup, rank), ckpt_path=attempt.resume)
        if attempt.after is not None:
            trainer.save_checkpoint(attempt.after)
        return _digest(module, strategy)
    except Stopped:
        return None
    finally:
        recorder.close()
        parallel_state.destroy_model_parallel()


def make_trainer(
    setup: Setup, strategy: Any, folder: str, steps: int, callbacks: list[Callback], **options: Any
) -> Trainer:
    """A quiet one that saves as the set-up says, after the other callbacks."""
    common: dict[str, Any] = {"dirpath": f"{folder}/ckpt", "save_top_k": -1, "enable_version_counter": False}
    saving = [
        ModelCheckpoint(filename="{step}", every_n_train_steps=setup.every or 1, **common),
        ModelCheckpoint(filename="end-of-{epoch}", save_on_train_epoch_end=True, **common),
    ]
    automatic = {"accumulate_grad_batches": setup.accumulate, "gradient_clip_val": 1.0}
    return Trainer(
        **({} if setup.manual else automatic) | options,
        strategy=strategy,
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=[*callbacks, *saving] if setup.every else callbacks,
        enable_checkpointing=setup.every > 0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def make_loader(setup: Setup, rank: int) -> DataLoader[Any]:
    """The loader of a rank."""
    data, replicas = Numbered(), 1 if setup.layout == "tp" else 2
    options: dict[str, Any] = {"batch_size": BATCH // replicas, "num_workers": setup.workers}
    if setup.workers:
        options["multiprocessing_context"] = (
            "fork"  # as it is under torchrun; a warm rank would start servers
        )
    if setup.positional:
        sampler = PositionalSampler(
            data, num_replicas=replicas, rank=rank % replicas, seed=3, shuffle=setup.shuffle, group_size=BATCH
        )
        return DataLoader(data, sampler=sampler, **options)
    return DataLoader(data, shuffle=setup.shuffle, **options)


def _digest(module: LightningModule, strategy: Any) -> str:
    digest = hashlib.sha256(json.dumps(dict(mesh.current().coordinates)).encode())
    tensors = [p.detach() for _, p in sorted(module.named_parameters())]
    for piece in strategy.optimizers[0].export_state():
        digest.update(json.dumps([piece.start, piece.stop, sorted(piece.scalars.items())]).encode())
        tensors += [tensor.detach() for _, tensor in sorted(piece.tensors.items())]
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def records(folder: Path, rank: int) -> list[dict[str, Any]]:
    """The lines of a rank, in order."""
    path = folder / f"record-{rank}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
