"""Training on the device under the Trainer: what it asks of the device, step by step, and that it is the CPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

from neuron_lightning import (
    NeuronLTModule,
    NeuronTensorBoardLogger,
    NeuronTQDMProgressBar,
    NeuronXLAStrategy,
    neuronx_distributed_config,
    parallel_state,
)
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM
from neuron_lightning.testing import RankPool, run_distributed
from tests.devices import device
from tests.dist.strategy_cases import Records

STEPS, EVERY, ACCUMULATE = 12, 4, 2
SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip


class Watch(Callback):
    """What the device was asked between one batch's arrival and the next."""

    def __init__(self) -> None:
        self.by_batch: list[dict[str, Any]] = []

    def on_train_batch_start(self, *args: Any) -> None:
        from neuron_sim import records

        records.reset()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        from neuron_sim import records

        seen = records.counts()
        self.by_batch.append(
            {"waits": dict(seen.transfers), "float64": dict(seen.float64), "fallbacks": dict(seen.fallbacks)}
        )


class Where(Callback):
    """Whether training was on the rank's device: afterwards the strategy brings the module back."""

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        assert {p.device.type for p in module.parameters()} == {device().type}


def fit(logger: Any, every: int, tp: int, zero1: bool, callbacks: list[Callback]) -> None:
    seed_everything(7, verbose=False)
    config = neuronx_distributed_config(
        tensor_parallel_size=tp,
        sequence_parallel=tp > 1,
        optimizer_config={"zero_one_enabled": zero1, "grad_clipping": True, "max_grad_norm": 1.0},
    )
    module = NeuronLTModule(
        config, torch.optim.AdamW, torch.optim.lr_scheduler.StepLR,
        model_fn=LlamaForCausalLM, model_args=(LlamaConfig(**SHAPE),), opt_kwargs={"lr": 1e-2},
        scheduler_args=(3,), grad_accum_steps=ACCUMULATE,
    )  # fmt: skip
    trainer = Trainer(
        strategy=NeuronXLAStrategy(nxd_config=config), max_steps=STEPS, log_every_n_steps=every,
        logger=logger, callbacks=[*callbacks, Where(), NeuronTQDMProgressBar()],
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
    )  # fmt: skip
    rows = torch.randint(0, 96, (4 * STEPS * ACCUMULATE, 16), generator=torch.Generator().manual_seed(0))
    loader = DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=2)
    try:
        trainer.fit(module, loader)
    finally:
        parallel_state.destroy_model_parallel()


def rank_is_watched(folder: str, tp: int, zero1: bool) -> list[dict[str, Any]]:
    watch = Watch()
    fit(NeuronTensorBoardLogger(save_dir=folder), EVERY, tp, zero1, [watch])
    return watch.by_batch


def rank_records(tp: int, zero1: bool) -> list[dict[str, float]]:
    logger = Records()
    fit(logger, 1, tp, zero1, [])
    return [values for _, values in logger.records]


@pytest.mark.parametrize(("tp", "zero1"), [(1, True), (2, True), (2, False)])
def test_a_step_that_is_not_logged_never_waits(pool2: RankPool, tmp_path: Any, tp: int, zero1: bool) -> None:
    for batches in pool2.run(rank_is_watched, str(tmp_path), tp, zero1):
        assert len(batches) == STEPS * ACCUMULATE
        logged = {number for number in range(len(batches)) if (number + 1) % (EVERY * ACCUMULATE) == 0}
        for number, asked in enumerate(batches):
            assert asked["fallbacks"] == {}
            assert asked["float64"] == {}
            if (
                number not in logged and number - 1 not in logged
            ):  # the bar shows a logged step one batch later
                waits = {what: count for what, count in asked["waits"].items() if what != "to device"}
                assert waits == {}, (number, waits)


@pytest.mark.parametrize(("tp", "zero1"), [(1, True), (2, True)])
def test_losses_and_gradient_norms_are_those_of_the_cpu(pool2: RankPool, tp: int, zero1: bool) -> None:
    on_host = run_distributed(rank_records, 2, tp, zero1)
    on_device = pool2.run(rank_records, tp, zero1)
    assert len(on_host[0]) == STEPS
    for mine, theirs in zip(on_device[0], on_host[0], strict=True):
        assert mine.keys() == theirs.keys()
        for name in ("loss", "global_norm", "lr"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name
