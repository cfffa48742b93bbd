"""What a rank of the XLA suite does; functions for the pools."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch.optim.lr_scheduler import LambdaLR

from neuron_lightning import NeuronModelCheckpoint
from neuron_lightning.backends import get_backend
from tests.xla import llama
from tests.xla.llama import Seen, train


def deviation(values: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference."""
    assert len(values) == len(expected)
    return max(abs(v - e) / abs(e) for v, e in zip(values, expected, strict=True))


def layout(tp: int, steps: int, **options: Any) -> Seen:
    """A plain run."""
    return train(tp=tp, steps=steps, **options)


def passes_0_and_1(step: int) -> float:
    """Factors of a learning rate of 1.0."""
    return {5: 0.0, 6: 1.0, 20: 0.0, 21: 0.0, 22: 1.0}.get(step, 1e-3)


class _Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.seen.append(pl_module.lr)


class _CountedSaves(Callback):
    """What each save compiles and transfers, by itself."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        save = trainer.strategy.save_checkpoint

        def counted(*args: Any, **kwargs: Any) -> None:
            before = get_backend().graph_counts()
            save(*args, **kwargs)
            self.seen.append(get_backend().graph_counts() - before)

        trainer.strategy.save_checkpoint = counted


def everything(folder: Path) -> tuple[Seen, list[Any], list[float], list[str]]:
    """Saves, validations, a logger, a bar's metrics, several epochs, and a schedule through 0.0 and 1.0."""
    rates, saves = _Rates(), _CountedSaves()
    checkpoints = NeuronModelCheckpoint(dirpath=folder / "checkpoints", every_n_train_steps=15, save_top_k=-1)
    seen = train(
        steps=50,
        lr=1.0,
        scheduler=_schedule,
        callbacks=(rates, saves, checkpoints),
        trainer_options={
            "limit_val_batches": None,
            "val_check_interval": 13,
            "check_val_every_n_epoch": None,
            "enable_checkpointing": True,
            "logger": True,
            "log_every_n_steps": 5,
        },
        root=folder,
    )
    return seen, saves.seen, rates.seen, os.listdir(folder / "checkpoints")


def _schedule(optimizer: Any) -> LambdaLR:
    return LambdaLR(optimizer, passes_0_and_1)


def save_at(folder: Path, steps: int, zero1: bool = True) -> Seen:
    """Trains and leaves a checkpoint of the last step."""
    keep = NeuronModelCheckpoint(dirpath=folder / "checkpoints", every_n_train_steps=steps)
    return train(steps=steps, zero1=zero1, callbacks=(keep,), trainer_options={"enable_checkpointing": True})


def go_on(folder: Path, steps: int, zero1: bool = True) -> Seen:
    """Goes on from it."""
    keep = NeuronModelCheckpoint(dirpath=folder / "checkpoints", every_n_train_steps=1000)
    return train(
        steps=steps,
        zero1=zero1,
        callbacks=(keep,),
        trainer_options={"enable_checkpointing": True},
        strategy_options={"auto_resume": True},
    )


def interrupted(folder: Path, tp: int, zero1: bool) -> tuple[Seen, Seen]:
    """12 steps at once, and the last 6 of them from a checkpoint."""
    whole = train(tp=tp, steps=12, zero1=zero1)
    save_at(folder, 6, zero1)
    return whole, go_on(folder, 12, zero1)


def trial(folder: Path) -> tuple[int, list[str]]:
    """As ``neuron_parallel_compile`` runs it; losses are not looked at."""
    os.environ["NEURON_EXTRACT_GRAPHS_ONLY"] = "1"
    try:
        keep = NeuronModelCheckpoint(dirpath=folder / "checkpoints", every_n_train_steps=2)
        seen = train(steps=40, callbacks=(keep,), trainer_options={"enable_checkpointing": True})
        there = folder / "checkpoints"
        return len(seen.losses), [
            name for name in os.listdir(there) if name.endswith(".ckpt")
        ] if there.exists() else []
    finally:
        del os.environ["NEURON_EXTRACT_GRAPHS_ONLY"]


class _Fails(llama.Slice):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if self.trainer.global_step == 2:
            self.kept = outputs  # a graph that is alive when everything is torn down
            raise ZeroDivisionError("in the forward pass")
        return outputs


def fails_in_a_step() -> str:
    """What comes out of the Trainer."""
    try:
        train(steps=4, module_class=_Fails)
    except (ArithmeticError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def warms_up(precision: str) -> Seen:
    """A learning rate that starts at 0.0, and rows of the embedding that never get a gradient."""
    return train(
        steps=12,
        vocab_size=2 * llama.VOCAB,
        scheduler=_warm_up,
        trainer_options={"precision": precision},
    )


def _warm_up(optimizer: Any) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: step / 4 if step < 4 else 1.0)
