"""The Llama slice: a small Llama pretrained under the Trainer, on whatever backend this process has."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from neuron_lightning import NeuronLTModule, NeuronXLAStrategy
from neuron_lightning.backends import get_backend
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM
from neuron_lightning.parallel import mesh

VOCAB, LENGTH, BATCH, SAMPLES = 64, 16, 8, 64
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
)


@dataclass
class Seen:
    """What a run was seen to do.

    Attributes:
        losses: by optimizer step, mean over the global batch.
        norms: by optimizer step, before clipping.
        counts: by optimizer step, what torch-xla counted since the step before; empty elsewhere.
        val_losses: by validation.
        weights: at the end.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    counts: list[dict[str, int]] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0


class Tokens(Dataset[dict[str, Tensor]]):
    """Fixed random sequences."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class Slice(NeuronLTModule):
    """The Llama with batches of the global size ``BATCH``, whatever the layout."""

    def train_dataloader(self) -> Any:
        return DataLoader(Tokens(), batch_size=self._size(), shuffle=False)

    def val_dataloader(self) -> Any:
        return DataLoader(Tokens(), batch_size=self._size(), shuffle=False)

    def _size(self) -> int:
        return BATCH // self.grad_accum_steps // mesh.current().sizes["dp"]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss, sync_dist=True)


class Watch(Callback):
    """Keeps what each step left on the device, without reading it, and the counts."""

    def __init__(self) -> None:
        self.seen = Seen()
        self._kept: list[Tensor] = []
        self._before: Any = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if not pl_module.should_print:
            return
        self._kept += [pl_module.loss, pl_module.global_norm]
        if get_backend().records_graphs:
            now = get_backend().graph_counts()
            if self._before is not None:
                self.seen.counts.append(vars(now - self._before))
            self._before = now

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen.val_losses.append(float(trainer.callback_metrics["val_loss"]))

    def on_train_end(self, *_: Any) -> None:
        values = [float(value) for value in get_backend().to_host(self._kept)]
        self.seen.losses, self.seen.norms = values[::2], values[1::2]


def train(
    *,
    tp: int = 1,
    steps: int = 100,
    zero1: bool = True,
    accumulate: int = 1,
    lr: float = 1e-3,
    optimizer: Any = torch.optim.AdamW,
    scheduler: Callable[..., Any] | None = None,
    callbacks: tuple[Any, ...] = (),
    trainer_options: dict[str, Any] | None = None,
    strategy_options: dict[str, Any] | None = None,
    module_class: type[Slice] = Slice,
    vocab_size: int = VOCAB,
    root: Path | None = None,
) -> Seen:
    """Trains and says what was seen. Every rank calls it together."""
    began = time.monotonic()
    torch.manual_seed(3)
    watch = Watch()
    module = module_class(
        model_fn=LlamaForCausalLM,
        model_args=(replace(CONFIG, vocab_size=vocab_size),),
        opt_cls=optimizer,
        opt_kwargs={"lr": lr},
        scheduler_cls=scheduler,
        grad_accum_steps=accumulate,
    )
    options: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
        "gradient_clip_val": None,
        **(trainer_options or {}),
    }
    trainer = Trainer(
        strategy=NeuronXLAStrategy(tensor_parallel_size=tp, zero1=zero1, **(strategy_options or {})),
        max_steps=steps,
        max_epochs=-1,
        callbacks=[watch, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        **options,
    )
    trainer.fit(module)
    watch.seen.weights = {name: t.detach().cpu().clone() for name, t in module.model.state_dict().items()}
    watch.seen.seconds = time.monotonic() - began
    return watch.seen
