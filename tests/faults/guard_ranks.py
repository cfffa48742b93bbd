"""Trainings that must not go on: one that is configured otherwise than its checkpoint, one that has blown up."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from neuron_lightning import NeuronXLAStrategy, parallel_state
from neuron_lightning.errors import NeuronLightningError
from tests.faults import resume_ranks
from tests.faults.resume_ranks import STRATEGIES, Setup


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What shapes a training."""

    lr: float = 0.01
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    gamma: float = 0.9
    step_size: int = 4
    scheduler: str = "StepLR"
    vocab_size: int = 50
    seq_len: int = 64
    label_smoothing: float = 0.1
    seed: int = 11
    clip: float = 1.0
    accumulate: int = 1
    precision: str = "32-true"


class Tuned(resume_ranks.Noisy):
    """A module with settings."""

    def __init__(self, setup: Setup, settings: Settings) -> None:
        super().__init__(setup)
        self.settings, self.vocab_size = settings, settings.vocab_size
        self.save_hyperparameters({"seq_len": settings.seq_len, "label_smoothing": settings.label_smoothing})

    def _loss(self, batch: Any) -> Tensor:
        x, y, ids = batch
        return super()._loss((x.to(self.dtype), y.to(self.dtype), ids))

    def configure_optimizers(self) -> Any:
        """As the settings say."""
        s = self.settings
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=s.lr, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay
        )
        arguments = {"step_size": s.step_size} if s.scheduler == "StepLR" else {}
        schedule = getattr(torch.optim.lr_scheduler, s.scheduler)(optimizer, gamma=s.gamma, **arguments)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def rank_drifts(
    setup: Setup, folder: str, settings: Settings, steps: int, resume: str | None
) -> tuple[str, int]:
    """Trains to ``steps``; the error, or nothing, and the step reached. ``resume`` is a path, ``auto``, or None."""
    seed_everything(settings.seed, verbose=False)
    strategy = NeuronXLAStrategy(**STRATEGIES[setup.layout], auto_resume=resume == "auto")
    trainer = resume_ranks.make_trainer(
        replace(setup, accumulate=settings.accumulate), strategy, folder, steps, [],
        gradient_clip_val=settings.clip, precision=settings.precision,
    )  # fmt: skip
    path = None if resume == "auto" else resume
    try:
        trainer.fit(
            Tuned(setup, settings), resume_ranks.make_loader(setup, int(os.environ["RANK"])), ckpt_path=path
        )
    except NeuronLightningError as error:
        return str(error), trainer.global_step
    finally:
        parallel_state.destroy_model_parallel()
    return "", trainer.global_step


PLACES = ("data", "weight", "gradient", "exp_avg", "exp_avg_sq", "master")


@dataclass(frozen=True, kw_only=True)
class Poison:
    """A value that is not finite, on one rank alone.

    Attributes:
        place: one of :data:`PLACES`.
        value: ``nan``, ``inf`` or ``-inf``.
        rank: where.
        step: after how many steps.
        element: fraction of the tensor at which it stands.
    """

    place: str
    value: str
    rank: int
    step: int
    element: float


class Poisoner(Callback):
    """Puts it there, once."""

    def __init__(self, poison: Poison) -> None:
        self.poison = poison

    def _due(self, trainer: Trainer) -> bool:
        return trainer.global_step == self.poison.step and trainer.global_rank == self.poison.rank

    def _put(self, tensor: Tensor) -> None:
        flat = tensor.detach().view(-1)
        flat[int(self.poison.element * flat.numel())] = float(self.poison.value)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Into the input."""
        if self.poison.place == "data" and self._due(trainer):
            self._put(batch[0])

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        """Into a gradient, before ranks add theirs up."""
        if self.poison.place == "gradient" and self._due(trainer):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self._put(gradients[0])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Into what is saved, after a step and before the save."""
        if self.poison.place in ("data", "gradient") or not self._due(trainer):
            return
        if self.poison.place == "weight":
            self._put(pl_module.down.weight)
            return
        pieces = [p for p in trainer.optimizers[0].export_state() if self.poison.place in p.tensors]
        self._put(pieces[0].tensors[self.poison.place])


def rank_blows_up(setup: Setup, folder: str, poison: Poison, precision: str, steps: int) -> str:
    """Trains until a save is refused. Returns the error."""
    seed_everything(11, verbose=False)
    strategy = NeuronXLAStrategy(**STRATEGIES[setup.layout])
    module = Tuned(setup, Settings())
    trainer = resume_ranks.make_trainer(
        setup, strategy, folder, steps, [Poisoner(poison)], precision=precision, gradient_clip_val=None
    )
    try:
        trainer.fit(module, resume_ranks.make_loader(setup, int(os.environ["RANK"])))
    except NeuronLightningError as error:
        return str(error)
    finally:
        parallel_state.destroy_model_parallel()
    return ""
