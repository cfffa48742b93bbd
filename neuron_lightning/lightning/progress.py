"""The progress bar: one bar, on one rank, that never makes the device wait.

What a step costs is decided by what the host reads back. The bar reads tensors only after steps that are logged
(``Trainer(log_every_n_steps=…)``); between them it moves, with the values that it has. It works with Lightning's own
strategies too.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

from neuron_lightning.lightning.linebar import LINE_SECONDS, LineBar, in_notebook
from neuron_lightning.lightning.throughput import Speedometer

_GRAD_NORM_NAMES = ("grad_norm", "global_norm", "gradient_norm")


class NeuronTQDMProgressBar(TQDMProgressBar):
    """Loss, learning rate, gradient norm and tokens/s over a count of optimizer steps.

    Metrics that the module logs with ``prog_bar=True`` are shown first. The learning rate (of the first parameter
    group) and the optimizer's ``grad_norm`` are added where the module does not log them, and so is the loss of
    the last micro-batch under automatic optimization. Tokens are counted from the shapes of the batches, times the
    data-parallel size; where a batch holds no token ids, samples are. With ``max_steps`` the bar counts optimizer
    steps towards it over all epochs, otherwise the batches of an epoch.

    In a terminal it is a live bar, in a notebook a widget, and where the output is a file a plain line now and then.

    Args:
        refresh_rate: batches between updates; 0 shows nothing.
        process_position: lines by which a terminal's bar is moved down.
        leave: whether the bar of every epoch stays.
        line_seconds: without a terminal, the least time between two lines.
    """

    def __init__(
        self,
        refresh_rate: int = 1,
        process_position: int = 0,
        leave: bool = False,
        *,
        line_seconds: float = LINE_SECONDS,
    ) -> None:
        super().__init__(refresh_rate, process_position, leave)
        self._line_seconds = line_seconds
        self._speed = Speedometer()
        self._shown: dict[str, Any] = {}
        self._unread = False
        self._last_step = self._count = 0
        self._lr: Any = None
        self._loss: Any = None

    # -- bars ------------------------------------------------------------------------------------------------

    def init_sanity_tqdm(self) -> Tqdm:
        """The bar over the validation batches before training."""
        return self._bar(self.sanity_check_description, leave=False)

    def init_train_tqdm(self) -> Tqdm:
        """The bar over training."""
        return self._bar(self.train_description, unit="step" if self._counts_steps() else "batch")

    def init_validation_tqdm(self) -> Tqdm:
        """The bar over validation, below the training bar if there is one."""
        alone = self.trainer.state.fn == "validate"
        return self._bar(self.validation_description, leave=alone, below=not alone)

    def init_test_tqdm(self) -> Tqdm:
        """The bar over a test."""
        return self._bar(self.test_description)

    def init_predict_tqdm(self) -> Tqdm:
        """The bar over predictions."""
        return self._bar(self.predict_description)

    def _bar(self, text: str, *, leave: bool = True, below: bool = False, unit: str = "batch") -> Tqdm:
        kwargs: dict[str, Any] = {
            "desc": text,
            "position": 2 * self.process_position + below,
            "disable": self.is_disabled,
            "leave": leave,
            "dynamic_ncols": True,
            "file": sys.stdout,
            "smoothing": 0,
            "miniters": 1,
            "unit": unit,
            "bar_format": self.BAR_FORMAT,
        }
        if sys.stdout.isatty() or in_notebook():
            return Tqdm(**kwargs)
        return LineBar(line_seconds=self._line_seconds, mininterval=0, **kwargs)

    # -- training --------------------------------------------------------------------------------------------

    def on_train_start(self, *_: Any) -> None:
        """Opens the bar, at the step that a resumed run begins with."""
        super().on_train_start(*_)
        self._speed, self._shown, self._unread = Speedometer(), {}, False
        self._last_step = self.trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Names the epoch; the count starts again only where batches are counted."""
        self._read()
        bar = self.train_progress_bar
        if self._leave and bar.disable:
            bar = self.train_progress_bar = self.init_train_tqdm()
        if self._counts_steps():
            bar.total = trainer.max_steps
            if not bar.n:
                bar.initial = bar.n = bar.last_print_n = trainer.global_step
        else:
            bar.reset(total=_finite(self.total_train_batches))
        bar.set_description(f"Epoch {trainer.current_epoch}", refresh=False)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Reads what the step before has logged, now that all hooks have logged it."""
        if self.is_disabled:
            return
        self._read()
        self._speed.start()
        self._lr = next((g.get("lr") for o in trainer.optimizers[:1] for g in o.param_groups), None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar; reads no tensor."""
        if self.is_disabled:
            return
        self._speed.add(batch, _data_parallel_size(trainer))
        stepped = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        bar, counts_steps = self.train_progress_bar, self._counts_steps()
        count = trainer.global_step if counts_steps else batch_idx + 1
        self._count = count
        if stepped and self._is_logged(trainer):
            self._unread = True  # count and metrics move together, when all hooks have logged
            self._loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        elif not self._unread and self._should_update(batch_idx + 1, bar.total):
            bar.update(count - bar.n)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the bar if every epoch keeps its own; the metrics of the epoch are not there yet."""
        if self._leave and not self._counts_steps():
            self.train_progress_bar.close()

    def on_train_end(self, *_: Any) -> None:
        """Shows the last values and closes the bar."""
        self._read()
        self.train_progress_bar.close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the validation's bar; its time does not count for tokens/s."""
        self._speed.pause()
        super().on_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the validation's bar and shows its metrics in the training bar."""
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()
        self._speed.resume()
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not self.is_disabled:
            self._show(self.get_metrics(trainer, pl_module))
            self.train_progress_bar.refresh()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the bars, so that what is said about the error starts on a line of its own."""
        for bar in (self._val_progress_bar, self._train_progress_bar):
            if bar is not None:
                bar.close()

    def get_metrics(self, trainer: Trainer, model: LightningModule) -> dict[str, Any]:
        """What is shown besides count and speed: the module's metrics, then what it left out."""
        metrics: dict[str, Any] = dict(super().get_metrics(trainer, model))
        for name in ("v_num", "global_step", "step", "epoch"):
            metrics.pop(name, None)
        if self._loss is not None and not any("loss" in name for name in metrics):
            metrics = {"loss": _number(self._loss), **metrics}
        if self._lr is not None and not any(name == "lr" or name.startswith("lr-") for name in metrics):
            metrics["lr"] = _number(self._lr)
        norm = getattr(trainer.optimizers[0], "grad_norm", None) if trainer.optimizers else None
        if norm is not None and not any(name in _GRAD_NORM_NAMES for name in metrics):
            metrics["grad_norm"] = _number(norm)
        return metrics

    def _read(self) -> None:
        """Reads the metrics of a logged step, once."""
        if not self._unread or self.is_disabled:
            return
        self._unread = False
        metrics = self.get_metrics(self.trainer, self.trainer.lightning_module)
        if (speed := self._speed.read()) is not None:
            metrics[speed[0]] = speed[1]
        self._loss = None
        self._show(metrics)
        bar = self.train_progress_bar
        bar.update(self._count - bar.n)

    def _show(self, metrics: Mapping[str, Any]) -> None:
        self._shown = {**self._shown, **metrics}
        texts = {name: _text(name, value) for name, value in self._shown.items()}
        self.train_progress_bar.set_postfix(texts, refresh=False)

    def _counts_steps(self) -> bool:
        return self.trainer.max_steps is not None and self.trainer.max_steps > 0

    @staticmethod
    def _is_logged(trainer: Trainer) -> bool:
        """Whether the step just made is one that Lightning's loggers get."""
        every = 1 if trainer.fast_dev_run else int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        return every > 0 and (trainer.global_step % every == 0 or bool(trainer.should_stop))


def _data_parallel_size(trainer: Trainer) -> int:
    """Ranks with batches of their own."""
    return int(getattr(trainer.strategy, "data_parallel_size", trainer.world_size))


def _number(value: Any) -> float:
    """A float; of a tensor this waits for the device."""
    return float(value.item()) if isinstance(value, Tensor) else float(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if name.endswith("/s"):
        return (
            f"{value / 1e6:.2f}M"
            if value >= 1e6
            else f"{value / 1e3:.1f}k"
            if value >= 1e4
            else f"{value:.0f}"
        )
    if name == "lr" or (value and not 1e-3 <= abs(value) < 1e4):
        return f"{value:.2e}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(total: float | None) -> float | None:
    return None if total is None or total == float("inf") else total
