"""Learning-rate schedules under the names that training scripts know; all of them are ``LambdaLR``."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from neuron_lightning.errors import ConfigError


def get_constant_schedule(optimizer: Optimizer, last_epoch: int = -1) -> LambdaLR:
    """The learning rate as it is."""
    return LambdaLR(optimizer, _constant, last_epoch)


def get_constant_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, last_epoch: int = -1
) -> LambdaLR:
    """From 0 up to the learning rate in ``num_warmup_steps`` optimizer steps, then constant."""
    _check(num_warmup_steps, None)
    return LambdaLR(optimizer, partial(_warm, num_warmup_steps=num_warmup_steps), last_epoch)


def get_linear_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    last_epoch: int = -1,
    *,
    min_lr_ratio: float = 0.0,
) -> LambdaLR:
    """From 0 up in ``num_warmup_steps`` optimizer steps, then straight down until ``num_training_steps``.

    Args:
        optimizer: whose learning rates are driven.
        num_warmup_steps: optimizer steps of the rise.
        num_training_steps: optimizer steps in all.
        last_epoch: -1, or the last step of the run that is resumed.
        min_lr_ratio: fraction of the learning rate that is left at the end.

    Raises:
        ConfigError: the steps are negative, or fewer in all than in the rise.
    """
    _check(num_warmup_steps, num_training_steps)
    steps = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    return LambdaLR(optimizer, partial(_linear, **steps, min_lr_ratio=min_lr_ratio), last_epoch)


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    *,
    min_lr_ratio: float = 0.0,
) -> LambdaLR:
    """From 0 up in ``num_warmup_steps`` optimizer steps, then down a cosine until ``num_training_steps``.

    Afterwards it stays where it is.

    Args:
        optimizer: whose learning rates are driven.
        num_warmup_steps: optimizer steps of the rise.
        num_training_steps: optimizer steps in all.
        num_cycles: waves of the cosine; 0.5 goes from the top to the bottom once.
        last_epoch: -1, or the last step of the run that is resumed.
        min_lr_ratio: fraction of the learning rate at the bottom.

    Raises:
        ConfigError: the steps are negative, or fewer in all than in the rise.
    """
    _check(num_warmup_steps, num_training_steps)
    steps = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    shape = partial(_cosine, **steps, num_cycles=num_cycles, min_lr_ratio=min_lr_ratio)
    return LambdaLR(optimizer, shape, last_epoch)


def _constant(_: int) -> float:
    return 1.0


def _warm(step: int, *, num_warmup_steps: int) -> float:
    return min(1.0, step / max(1, num_warmup_steps))


def _linear(step: int, *, num_warmup_steps: int, num_training_steps: int, min_lr_ratio: float) -> float:
    if step < num_warmup_steps:
        return _warm(step, num_warmup_steps=num_warmup_steps)
    left = max(0.0, (num_training_steps - step) / max(1, num_training_steps - num_warmup_steps))
    return min_lr_ratio + (1.0 - min_lr_ratio) * left


def _cosine(
    step: int, *, num_warmup_steps: int, num_training_steps: int, num_cycles: float, min_lr_ratio: float
) -> float:
    if step < num_warmup_steps:
        return _warm(step, num_warmup_steps=num_warmup_steps)
    progress = min(1.0, (step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps))
    wave = 0.5 * (1.0 + math.cos(math.pi * 2.0 * num_cycles * progress))
    return min_lr_ratio + (1.0 - min_lr_ratio) * max(0.0, wave)


def _check(num_warmup_steps: int, num_training_steps: int | None) -> None:
    if num_warmup_steps < 0 or (num_training_steps is not None and num_training_steps < num_warmup_steps):
        raise ConfigError(
            f"a schedule of {num_training_steps} training steps with {num_warmup_steps} warm-up steps: both must be "
            "at least 0, and the warm-up not longer than the training; both count optimizer steps."
        )
