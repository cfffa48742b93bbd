"""NeuronLTModule under the Trainer: the guide's loop, both kinds of optimization, and what is logged."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from neuron_lightning import (
    NeuronLightningDataModule,
    NeuronLTModule,
    NeuronXLAStrategy,
    neuronx_distributed_config,
    parallel_state,
    xm,
)
from neuron_lightning.parallel import ColumnParallelLinear, RowParallelLinear
from tests.dist import strategy_cases as cases


class Net(nn.Module):
    """A tensor-parallel MLP that returns its loss."""

    def __init__(self, width):
        super().__init__()
        self.up = ColumnParallelLinear(8, width, gather_output=False, dtype=torch.float64)
        self.down = RowParallelLinear(width, 4, input_is_parallel=True, dtype=torch.float64)

    def forward(self, x, y):
        return {"loss": (self.down(torch.tanh(self.up(x))) - y).square().mean()}


class Guide(NeuronLTModule):
    """The guide's training step and logging, word for word in what they do."""

    def training_step(self, batch, batch_idx):
        xm.mark_step()
        for logger in self.trainer.loggers:
            logger.print_step = -1
        self.should_print = False
        loss = self.model(x=batch["x"], y=batch["y"])["loss"] / self.grad_accum_steps
        loss.backward()
        self.averaged_loss += loss.detach()
        xm.mark_step()
        if not self.automatic_optimization and (batch_idx + 1) % self.grad_accum_steps == 0:
            self.should_print = True
            loss_div = self.averaged_loss / self.trainer.strategy.data_parallel_size
            groups = parallel_state.get_data_parallel_group(as_list=True)
            loss_reduced = xm.all_reduce(xm.REDUCE_SUM, loss_div, groups=groups)
            self.averaged_loss.zero_()
            optimizer, scheduler = self.optimizers(), self.lr_schedulers()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            xm.mark_step()
            self.loss = loss_reduced.detach()
        return loss

    def on_train_batch_end(self, *args, **kwargs):
        if self.should_print:
            self.log("loss", self.loss.detach().cpu().item(), prog_bar=True)
            self.log("global_step", self.global_step, prog_bar=True, on_step=True, on_epoch=True)
            for logger in self.trainer.loggers:
                logger.print_step = self.global_step


def loader(data_dir, batch_size, dp_size, dp_rank):
    rows = [{"x": x, "y": y} for x, y, _ in cases.dataset()]
    # Consecutive runs of rows per rank: global windows hold the same rows at every dp size.
    share = batch_size
    mine = [
        row for start in range(0, len(rows), share * dp_size) for row in rows[start:][share * dp_rank : share * (dp_rank + 1)]
    ]  # fmt: skip
    return DataLoader(mine, batch_size=batch_size)


def rank_trains(kind, tp, manual, accumulate, batch_size):
    seed_everything(7, verbose=False)  # warm ranks keep the seed of the test before in their environment
    logger = cases.Records()
    config = neuronx_distributed_config(
        tensor_parallel_size=tp, optimizer_config={"zero_one_enabled": True, "max_grad_norm": 0.2}
    )
    module = kind(
        nxd_config=config, opt_cls=torch.optim.AdamW, scheduler_cls=torch.optim.lr_scheduler.StepLR, model_fn=Net,
        model_args=(16,), opt_kwargs={"lr": 0.05, "weight_decay": 0.1}, scheduler_args=(3,),
        grad_accum_steps=accumulate if manual else 1, manual_opt=manual,
    )  # fmt: skip
    trainer = Trainer(
        strategy=NeuronXLAStrategy(nxd_config=config), max_epochs=2, logger=logger, log_every_n_steps=1,
        accumulate_grad_batches=1 if manual else accumulate, **cases.QUIET,
    )  # fmt: skip
    try:
        trainer.fit(module, datamodule=NeuronLightningDataModule(loader, None, batch_size))
        return [(step, record["loss"]) for step, record in logger.records if "loss" in record], logger.records
    finally:
        parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module")
def expected(pool1):
    return pool1.run(rank_trains, NeuronLTModule, 1, True, 2, 8)[0][0]


@pytest.mark.parametrize("kind", [NeuronLTModule, Guide])
@pytest.mark.parametrize(("tp", "accumulate", "batch_size"), [(1, 2, 4), (1, 1, 8), (2, 2, 8)])
def test_losses_are_the_same_in_every_layout(pool2, expected, kind, tp, accumulate, batch_size):
    losses, _ = pool2.run(rank_trains, kind, tp, True, accumulate, batch_size)[0]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in expected], rel=1e-6)


def test_automatic_optimization_is_the_same(pool2, expected):
    losses, _ = pool2.run(rank_trains, NeuronLTModule, 1, False, 2, 4)[0]
    assert losses == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]


@pytest.mark.parametrize("manual", [True, False])
def test_what_is_logged(pool2, manual):
    _, records = pool2.run(rank_trains, NeuronLTModule, 1, manual, 2, 4)[0]
    assert [step for step, _ in records] == [1, 2, 3, 4]
    assert all({"loss", "lr", "global_norm", "global_step", "epoch"} <= set(record) for _, record in records)
    assert [record["global_step"] for _, record in records] == [1, 2, 3, 4]
    assert [record["lr"] for _, record in records] == pytest.approx([0.05, 0.05, 0.05, 0.005])


def rank_guides_checkpoint(folder):
    config = neuronx_distributed_config(optimizer_config={"zero_one_enabled": True})
    module = NeuronLTModule(
        config, torch.optim.AdamW, model_fn=Net, model_args=(16,), opt_kwargs={"lr": 0.01}
    )
    saving = ModelCheckpoint(
        save_top_k=2, monitor="global_step", mode="max", every_n_train_steps=2, dirpath=folder
    )
    trainer = Trainer(
        strategy=NeuronXLAStrategy(nxd_config=config), max_steps=8, logger=False, callbacks=[saving],
        log_every_n_steps=50, **{**cases.QUIET, "enable_checkpointing": True},
    )  # fmt: skip
    try:
        trainer.fit(module, datamodule=NeuronLightningDataModule(loader, None, 2))
        trainer.strategy.barrier()
        return sorted(path.name for path in __import__("pathlib").Path(folder).iterdir())
    finally:
        parallel_state.destroy_model_parallel()


def test_the_guides_checkpoint_callback(pool2, tmp_path):
    names = pool2.run(rank_guides_checkpoint, str(tmp_path))[0]
    assert names == ["epoch=0-step=6.ckpt", "epoch=0-step=8.ckpt"]
