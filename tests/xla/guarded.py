"""Modules that do what the guard is there for, each in a line of its own."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from neuron_lightning import RecompileGuard
from neuron_lightning.errors import RecompileError
from tests.xla.llama import Seen, Slice, train

STEP = 5


class Reads(Slice):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        self.last = outputs.loss.item()  # the line
        return outputs


class Branches(Slice):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if outputs.loss > 1e6:  # the line
            return outputs._replace(loss=outputs.loss * 2)
        return outputs


class Shortens(Slice):
    def forward(self, batch: dict[str, Tensor]) -> Any:
        length = 12 if self.trainer.global_step == STEP else 16
        ids = batch["input_ids"][:, :length]  # the line
        return self.model(input_ids=ids, labels=ids)


class ChangesANumber(Slice):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        factor = 1.0 if self.trainer.global_step == STEP else 0.5
        return outputs._replace(loss=outputs.loss * factor)  # the line


class CountsOn(Slice):
    """Another number at every step from there on."""

    first = 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        length = self.first + max(0, self.trainer.global_step - STEP)
        extra = torch.arange(length, device=self.device)  # the line
        return outputs._replace(loss=outputs.loss + 0.0 * extra.sum())


class CountsOnFurther(CountsOn):
    """The same with graphs that this process has not compiled yet."""

    first = 50


def line_of(kind: type[Slice]) -> int:
    """Number of the line that is marked."""
    lines, first = inspect.getsourcelines(kind)
    return first + next(index for index, line in enumerate(lines) if "# the line" in line)


def guarded(kind: type[Slice], **options: Any) -> tuple[int, list[str], Seen | str]:
    """Trains under a guard: recompilations, reports, and what was seen or raised."""
    guard = RecompileGuard(**options)
    try:
        seen: Seen | str = train(steps=10, module_class=kind, callbacks=(guard,))
    except RecompileError as error:
        seen = str(error)
    return guard.num_recompiles, guard.reports, seen


def by_itself() -> list[str]:
    """Whether the strategy adds a guard that nobody asked for."""
    from lightning.pytorch import Callback

    found: list[str] = []

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            found.extend(type(callback).__name__ for callback in trainer.callbacks)

    train(steps=1, callbacks=(Look(),))
    return found
