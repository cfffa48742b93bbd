"""What a run shows for itself: where it stands at the start, and at the end loss, a sample of text, a picture."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from neuron_lightning.lightning.pretraining import PretrainingDataModule
from neuron_lightning.models.generate import generate

Curve = list[tuple[int, float]]


class RunReport(Callback):
    """Prints the ends of a run on rank 0.

    Args:
        sample_tokens: tokens of text to generate at the end; 0 for none.
        prompt: how the text begins.
        temperature: of the sampling; 0 takes the likeliest token.
        top_k: sample among this many tokens.
        plot: draw ``loss.png`` beside the log.
    """

    def __init__(
        self,
        sample_tokens: int = 60,
        prompt: str = "import os\n\n\ndef ",
        temperature: float = 0.8,
        top_k: int = 40,
        plot: bool = True,
    ) -> None:
        self.sample_tokens = sample_tokens
        self.prompt = prompt
        self.temperature = temperature
        self.top_k = top_k
        self.plot = plot
        self._last_path: str | None = None
        self._started = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says from which step to which it trains."""
        self._started, self._first_step = time.monotonic(), trainer.global_step
        resumed = f"resuming after step {trainer.global_step}, " if trainer.global_step else ""
        message = (
            f"training: {resumed}{trainer.max_steps} optimizer steps in all; a model that knows nothing has loss "
            f"ln(vocabulary) = {math.log(pl_module.model.config.vocab_size):.3f}"
        )
        bar = trainer.progress_bar_callback
        if bar is None:
            _say(message)
        else:
            bar.print(message)  # above the bar that is open already

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loss, sample, picture and paths. All ranks together: saving and sampling need them all."""
        self._save_last_step(trainer)
        sample = self._sample(trainer, pl_module)
        if trainer.global_step > self._first_step:
            self._say_how_it_went(trainer, pl_module)
        if sample is not None:
            _say(f"\nA sample, prompted with {self.prompt!r}:\n" + _indented(sample))
        log_dir = trainer.log_dir  # Lightning sends it from rank 0: every rank has to ask
        self._say_where_things_are(trainer, None if log_dir is None else Path(log_dir))

    def _save_last_step(self, trainer: Trainer) -> None:
        """Saves the end of the run where the checkpoint interval does not divide it."""
        callback = trainer.checkpoint_callback
        if not isinstance(callback, ModelCheckpoint) or trainer.global_step == self._first_step:
            return
        step = trainer.global_step
        path = callback.format_checkpoint_name({"step": torch.tensor(step), "epoch": torch.tensor(0)})
        if not trainer.strategy.broadcast(Path(path).exists()):
            trainer.save_checkpoint(path, weights_only=False)
        self._last_path = path

    def _say_how_it_went(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = time.monotonic() - self._started
        _say(f"\ntrained {trainer.global_step - self._first_step} steps in {seconds:.0f} s")
        heldout = trainer.callback_metrics.get("val_loss")
        if heldout is not None:
            uniform = math.log(pl_module.model.config.vocab_size)
            _say(
                f"held-out loss {float(heldout):.3f}: {float(heldout) / uniform:.1%} of "
                f"ln(vocabulary) = {uniform:.3f}"
            )

    def _sample(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        data: Any = getattr(trainer, "datamodule", None)
        tokenizer = data.tokenizer() if isinstance(data, PretrainingDataModule) else None
        if not self.sample_tokens or tokenizer is None:
            return None
        ids = torch.tensor([tokenizer.encode(self.prompt)], device=pl_module.device)
        generated = generate(
            pl_module.model, ids, self.sample_tokens, temperature=self.temperature, top_k=self.top_k, seed=0
        )
        return tokenizer.decode(generated[0].tolist())

    @rank_zero_only
    def _say_where_things_are(self, trainer: Trainer, log_dir: Path | None) -> None:
        if log_dir is not None:
            _say(f"\nTensorBoard log  {log_dir}  (make tensorboard)")
        if self._last_path is not None:
            _say(f"last checkpoint  {self._last_path}")
        if self.plot and log_dir is not None:
            for logger in trainer.loggers:
                logger.save()
            picture = log_dir / "loss.png"
            _say(f"loss curve       {picture}" if plot_losses(log_dir, picture) else "no loss to draw yet")


def read_scalars(log_dir: Path, name: str) -> Curve:
    """(step, value) of a scalar in a TensorBoard folder, over all runs logged there; the latest value wins."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    events.Reload()
    if name not in events.Tags()["scalars"]:
        return []
    return sorted({event.step: event.value for event in events.Scalars(name)}.items())


def plot_losses(log_dir: Path, picture: Path) -> bool:
    """Draws training and held-out loss over optimizer steps; False if nothing was logged."""
    curves = {"training": read_scalars(log_dir, "loss"), "held-out": read_scalars(log_dir, "val_loss")}
    if not any(curves.values()):
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _say("matplotlib is not installed, so no loss.png: pip install 'neuron-lightning[llama]'")
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, points in curves.items():
        style = {"marker": "o", "linewidth": 2.0} if label == "held-out" else {"linewidth": 1.0}
        axes.plot([step for step, _ in points], [value for _, value in points], label=label, **style)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
    return True


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


@rank_zero_only
def _say(message: str) -> None:
    print(message, flush=True)
