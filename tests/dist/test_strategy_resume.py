"""A run that is saved and resumed on the same layout takes exactly the steps of the uninterrupted one."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from neuron_lightning import NeuronXLAStrategy, parallel_state
from neuron_lightning.errors import CheckpointError
from neuron_lightning.lightning import failures
from tests.dist import strategy_cases as cases

STEPS = 12  # of 8 batches an epoch: the end of the first run lies in its second half
SAVED = 5


class Noisy(cases.Mlp):
    """Draws numbers in every step."""

    def training_step(self, batch, batch_idx):
        batch[0] = torch.nn.functional.dropout(batch[0], 0.2)
        return super().training_step(batch, batch_idx)


class NoisyManual(cases.ManualMlp):
    """Manual optimization, two micro-batches a step."""

    def training_step(self, batch, batch_idx):
        batch[0] = torch.nn.functional.dropout(batch[0], 0.2)
        return super().training_step(batch, batch_idx)


def run(kind, folder, strategy, ckpt_path=None, precision="32-true", **options):
    module, logger = cases.new(kind), cases.Records()
    options = {"max_steps": STEPS, "log_every_n_steps": 1, "callbacks": [], **options}
    trainer = Trainer(
        strategy=NeuronXLAStrategy(**strategy), logger=logger, precision=precision,
        **{"max_epochs": -1, **cases.QUIET, "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in options["callbacks"]), **options},
    )  # fmt: skip
    data = cases.dataset(torch.float32)
    loader = DataLoader(
        data, batch_size=4 // (trainer.world_size // trainer.strategy.tensor_parallel_size), shuffle=True
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer, module, logger


def rank_resumes(folder, kind, strategy, options):
    saving = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=SAVED, save_top_k=-1)
    try:
        whole, module, logger = run(kind, folder, strategy, callbacks=[saving], **options)
        saved = f"{folder}/step={SAVED}.ckpt"
        os.utime(saved)  # the older one is the newest by its time
        assert failures.last_checkpoint(whole) == f"{folder}/step={2 * SAVED}.ckpt"
        resumed, again, later = run(kind, folder, strategy, ckpt_path=saved, **options)
        assert resumed.global_step == whole.global_step == STEPS
        for name, expected in cases.trained(module).items():
            assert torch.equal(cases.trained(again)[name], expected), name
        assert later.records == [record for record in logger.records if record[0] > SAVED]
        assert module.seen[len(module.seen) - len(again.seen) :] == again.seen
        return logger.steps
    finally:
        parallel_state.destroy_model_parallel()


CASES = [
    (Noisy, {"zero1": True}, {}),
    (Noisy, {"zero1": True}, {"precision": "bf16-true", "accumulate_grad_batches": 2}),
    (NoisyManual, {"zero1": False}, {}),
    (Noisy, {"tensor_parallel_size": 2, "tp_plan": {"up": "column", "down": "row"}}, {}),
    (Noisy, {"zero1": True}, {"log_every_n_steps": 2}),
    (NoisyManual, {"zero1": True}, {"log_every_n_steps": 3}),
]


@pytest.mark.parametrize(("kind", "strategy", "options"), CASES)
def test_a_resumed_run_is_bit_identical(pool2, tmp_path, kind, strategy, options):
    steps = pool2.run(rank_resumes, str(tmp_path), kind, strategy, options)[0]
    every = options.get("log_every_n_steps", 1)
    assert steps == list(range(every, STEPS + 1, every))


class SaveInWindow(Callback):
    """Asks for a checkpoint in the middle of an accumulation window, and for the removal of another."""

    def __init__(self, folder):
        self.folder = folder
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 3:
            trainer.save_checkpoint(f"{self.folder}/before")
        if batch_idx == 4:  # the first batch of the window that follows
            trainer.save_checkpoint(f"{self.folder}/inside")
            trainer.strategy.remove_checkpoint(f"{self.folder}/before")
        trainer.strategy.barrier()
        names = ("before", "inside")
        self.seen.append([shutil.os.path.isdir(f"{self.folder}/{name}") for name in names])
        trainer.strategy.barrier()


def rank_saves_in_window(folder):
    asking = SaveInWindow(folder)
    try:
        run(Noisy, folder, {"zero1": True}, callbacks=[asking], max_steps=4, accumulate_grad_batches=2)
        trainer, _, _ = run(
            Noisy,
            folder,
            {"zero1": True},
            ckpt_path=f"{folder}/inside",
            max_steps=4,
            accumulate_grad_batches=2,
        )
        return asking.seen, trainer.fit_loop.epoch_loop.batch_progress.total.completed
    finally:
        parallel_state.destroy_model_parallel()


def test_a_save_inside_a_window_waits_for_its_end(pool2, tmp_path):
    for seen, batches in pool2.run(rank_saves_in_window, str(tmp_path)):
        before, inside = [False, False], [True, False]
        assert seen == [before] * 3 + [inside] * 3 + [[False, True]] * 2
        assert batches == 8


def rank_loads(path):
    try:
        with pytest.raises(CheckpointError) as caught:
            run(Noisy, None, {}, ckpt_path=path)
    finally:
        parallel_state.destroy_model_parallel()
    return str(caught.value)


def test_what_is_no_checkpoint(pool2, tmp_path):
    (tmp_path / "file.ckpt").write_text("x")
    refused = "file.ckpt is refused (Unsupported operand 120): it holds code or classes, or it is damaged"
    for name, kind in [("file.ckpt", refused), ("none", "not there"), (".", "a folder without a manifest")]:
        for message in pool2.run(rank_loads, f"{tmp_path}/{name}"):
            assert kind in message


class Odd(NoisyManual):
    """Windows of three batches, of which an epoch of eight leaves two over."""

    def __init__(self):
        super().__init__(accumulate=3)


def rank_ends_in_window(folder):
    saving = ModelCheckpoint(dirpath=folder, filename="end", save_on_train_epoch_end=True)
    try:
        trainer, _, _ = run(Odd, folder, {}, callbacks=[saving], max_steps=-1, max_epochs=1)
        trainer.strategy.barrier()
        return trainer.global_step, shutil.os.path.isdir(f"{folder}/end.ckpt")
    finally:
        parallel_state.destroy_model_parallel()


def test_a_save_at_the_end_of_training_is_not_lost_in_an_open_window(pool2, tmp_path):
    assert pool2.run(rank_ends_in_window, str(tmp_path)) == [(2, True)] * 2
