"""Tiny modules and the functions that ranks run, for the tests of the strategy."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from neuron_lightning import NeuronXLAStrategy, parallel_state
from neuron_lightning.parallel import ColumnParallelLinear

QUIET: dict[str, Any] = {
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "auto",  # the backend in use: also a simulated device
}
SAMPLES = 32


class Records(Logger):
    """Keeps every record that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "records"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.records.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Not kept."""

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.records]


class Mlp(LightningModule):
    """Automatic optimization, a scheduler, and a parameter that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 4)
        self.unused = nn.Parameter(torch.ones(3))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, ids = batch
        self.seen += ids.tolist()
        loss = (self(x) - y).square().mean()
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = batch
        self.log("val_loss", (self(x) - y).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ManualMlp(Mlp):
    """Manual optimization as in the guide: bare backward, accumulation by hand."""

    def __init__(self, accumulate: int = 2) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulate = accumulate

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, ids = batch
        self.seen += ids.tolist()
        loss = (self(x) - y).square().mean() / self.accumulate
        loss.backward()
        self.log("micro", loss)
        if (batch_idx + 1) % self.accumulate == 0:
            optimizer, scheduler = self.optimizers(), self.lr_schedulers()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return loss


def dataset(dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, 8, generator=generator, dtype=dtype)
    y = torch.randn(SAMPLES, 4, generator=generator, dtype=dtype)
    return TensorDataset(x, y, torch.arange(SAMPLES))


def trained(module: LightningModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def fit(
    module: LightningModule,
    strategy: Any,
    *,
    replicas: int = 1,
    precision: Any = "64-true",
    epochs: int = 10,
    micro_batches: int = 2,
    **options: Any,
) -> Trainer:
    """Every optimizer step sees the whole data set, so that order and sharding do not matter."""
    loader = DataLoader(dataset(), batch_size=SAMPLES // replicas // micro_batches)
    trainer = Trainer(
        strategy=strategy, precision=precision, max_epochs=epochs, **{**QUIET, "logger": False, **options}
    )
    trainer.fit(module, loader)
    return trainer


def new(kind: type[LightningModule], *args: Any) -> LightningModule:
    seed_everything(11, verbose=False)
    return kind(*args)


def reference(kind: type[LightningModule], **options: Any) -> dict[str, Tensor]:
    """Lightning's own single-process run."""
    module = new(kind)
    fit(module, "auto", devices=1, **options)
    return trained(module)


def rank_fit(kind: type[LightningModule], strategy: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    module = new(kind)
    try:
        chosen = NeuronXLAStrategy(**strategy)
        trainer = fit(module, chosen, replicas=2 // chosen.settings.tp, **options)
        assert trainer.world_size == 2
        return trained(module)
    finally:
        parallel_state.destroy_model_parallel()


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-30)) for n in theirs)


class Built(Mlp):
    """Builds a parallel layer where the strategy defers drawing."""

    def configure_model(self) -> None:
        self.up = ColumnParallelLinear(8, 16, bias=False, gather_output=True)


def rank_built(tp: int) -> dict[str, Tensor]:
    module = new(Built)
    try:
        strategy = NeuronXLAStrategy(tensor_parallel_size=tp)
        fit(module, strategy, replicas=2 // tp, precision="32-true", epochs=0)
        return trained(module)
    finally:
        parallel_state.destroy_model_parallel()
