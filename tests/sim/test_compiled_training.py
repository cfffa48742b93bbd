"""A compiled Llama on the device under the Trainer: no graph after step 2, and a new shape is caught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

from neuron_lightning import NeuronLTModule, NeuronXLAStrategy, RecompileGuard, parallel_state
from neuron_lightning.backends import get_backend
from neuron_lightning.errors import RecompileError
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM
from neuron_lightning.testing import RankPool, run_distributed
from tests.dist.strategy_cases import Records
from tests.sim.test_training import SHAPE

STEPS = 20


class Compiled(NeuronLTModule):
    shorten_at: int | None = None

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if get_backend().name == "neuron" and self.model._compiled_call_impl is None:
            self.model.compile(backend="neuron", dynamic=False)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == self.shorten_at:
            batch = {key: value[:, :12] for key, value in batch.items()}
        return super().training_step(batch, batch_idx)


class Count(Callback):
    """Graphs that this process has compiled, by step."""

    def __init__(self) -> None:
        self.by_step: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        if get_backend().name == "neuron":
            from neuron_sim import dynamo

            self.by_step.append(len(dynamo.graphs))


def fit(logger: Any, shorten_at: int | None = None) -> list[int]:
    seed_everything(7, verbose=False)
    module = Compiled(model_fn=LlamaForCausalLM, model_args=(LlamaConfig(**SHAPE),), opt_kwargs={"lr": 1e-3})
    module.shorten_at = shorten_at
    count = Count()
    trainer = Trainer(
        strategy=NeuronXLAStrategy(zero1=True), max_steps=STEPS, log_every_n_steps=1, logger=logger,
        callbacks=[RecompileGuard(max_recompiles=0), count], enable_model_summary=False, enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    rows = torch.randint(0, 96, (4 * STEPS, 16), generator=torch.Generator().manual_seed(0))
    loader = DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=2)
    try:
        trainer.fit(module, loader)
    finally:
        parallel_state.destroy_model_parallel()
    return count.by_step


def rank_trains() -> tuple[list[float], list[int]]:
    """Losses, and the graphs compiled in each step."""
    from neuron_sim import dynamo

    torch._dynamo.reset()
    before = len(dynamo.graphs)
    logger = Records()
    by_step = fit(logger)
    losses = [values["loss"] for _, values in logger.records]
    return losses, [now - then for then, now in zip([before, *by_step], by_step, strict=False)]


def rank_gets_another_shape() -> str:
    torch._dynamo.reset()
    with pytest.raises(RecompileError) as caught:
        fit(Records(), shorten_at=7)
    return str(caught.value)


def rank_is_eager() -> list[float]:
    logger = Records()
    fit(logger)
    return [values["loss"] for _, values in logger.records]


def test_no_graph_is_compiled_after_step_2(pool2: RankPool) -> None:
    expected = run_distributed(rank_is_eager, 2, env={"NEURON_LIGHTNING_BACKEND": "cpu"})[0]
    for losses, compiled in pool2.run(rank_trains, timeout=300):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert compiled[0] >= 1
        assert compiled[2:] == [0] * (STEPS - 2)


def test_another_shape_fails_the_run_with_its_reason(pool2: RankPool) -> None:
    for said in pool2.run(rank_gets_another_shape, timeout=300):
        assert "at step 7" in said
        assert "expected 16, actual 12" in said
