"""What keeps a resumed run from being another one without anybody noticing, and a ruined one from being saved."""

from __future__ import annotations

import os

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback

from neuron_lightning import NeuronModelCheckpoint, NeuronXLAStrategy, checkpoint, parallel_state
from neuron_lightning.errors import CheckpointError, ConfigError
from neuron_lightning.lightning import drift
from tests.dist import strategy_cases as cases
from tests.dist.test_model_checkpoint import run, steps_in
from tests.dist.test_strategy_resume import Noisy


class Tunable(Noisy):
    """Has settings."""

    def __init__(self, lr=0.02, gamma=0.5, vocab_size=None, scheduler="StepLR", **hparams):
        super().__init__()
        self.save_hyperparameters(ignore=["vocab_size", "lr", "gamma", "scheduler"])
        self.lr, self.gamma, self.kind = lr, gamma, scheduler
        if vocab_size is not None:
            self.vocab_size = vocab_size

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)
        arguments = (5,) if self.kind == "StepLR" else ()
        scheduler = getattr(torch.optim.lr_scheduler, self.kind)(optimizer, *arguments, gamma=self.gamma)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_end(self, *args):
        self.lrs = [*getattr(self, "lrs", []), self.trainer.optimizers[0].param_groups[0]["lr"]]


def make(settings):
    def build():
        return Tunable(**settings)

    return build


def rank_drifts(folder, before, after, trainer_before, trainer_after, override, seed):
    """A run of four steps, and one with other settings from there; its error, or its learning rates."""
    saving = NeuronModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    try:
        run(make(before), {}, saving, max_steps=4, **trainer_before)
        steps = steps_in(folder)
        strategy = {"resume_override": override}
        if seed:
            cases.new = lambda kind, *a: (seed_everything(seed, verbose=False), kind(*a))[1]
        try:
            _, module, _ = run(
                make(after),
                strategy,
                saving,
                ckpt_path=f"{folder}/step=4.ckpt",
                max_steps=12,
                **trainer_after,
            )
        except ConfigError as error:
            assert steps_in(folder) == steps
            return str(error)
        return module.lrs
    finally:
        if seed:
            cases.new = original_new
        parallel_state.destroy_model_parallel()


original_new = cases.new

DRIFTS = [
    ({}, {"lr": 0.03}, {}, {}, "optimizer.0.0.lr: 0.02 in the checkpoint, 0.03 now", "['lr']"),
    ({}, {"gamma": 0.9}, {}, {}, "scheduler.0.gamma: 0.5 in the checkpoint, 0.9 now", "['scheduler']"),
    ({}, {"scheduler": "ExponentialLR"}, {}, {}, "scheduler.0.class: 'StepLR' in the checkpoint", None),
    ({"vocab_size": 50}, {"vocab_size": 51}, {}, {}, "vocab_size: 50 in the checkpoint, 51 now", None),
    ({"dropout": 0.1}, {"dropout": 0.2}, {}, {}, "hparams.dropout: 0.1 in the checkpoint", "['hparams.dropout']"),
    ({"seq_len": 64}, {"seq_len": 32}, {}, {}, "hparams.seq_len: 64 in the checkpoint, 32 now", "hparams.seq_len"),
    ({}, {}, {}, {"accumulate_grad_batches": 2}, "global_batch_size: 4 in the checkpoint, 8 now", "global_batch"),
    ({}, {}, {}, {"gradient_clip_val": 1.0}, None, None),  # was not set: nothing was noted
    ({}, {}, {"gradient_clip_val": 2.0}, {"gradient_clip_val": 1.0}, "gradient_clip_val: 2.0 in", "clip_val"),
    ({}, {}, {}, "seed", "seed: 11 in the checkpoint, 12 now", "['seed']"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "first", "second", "said", "remedy"), DRIFTS)
def test_drift_is_an_error_with_key_old_and_new_value(
    pool2, tmp_path, before, after, first, second, said, remedy
):
    seed = 12 if second == "seed" else None
    given = {} if second == "seed" else second
    for found in pool2.run(rank_drifts, str(tmp_path), before, after, first, given, [], seed):
        if said is None:
            assert isinstance(found, list)
            continue
        assert said in found
        assert ("resume_override" in found) == (remedy is not None)
        assert remedy is None or remedy in found


def test_an_override_lets_the_new_value_count(pool2, tmp_path):
    settings = ({}, {"lr": 0.04}, {}, {}, ["lr"], None)
    for lrs in pool2.run(rank_drifts, str(tmp_path / "lr"), *settings):
        assert lrs == pytest.approx([0.02] + [0.02] * 4 + [0.01] * 3)  # twice what the schedule gave before
    settings = ({}, {"gamma": 0.1}, {}, {}, ["scheduler"], None)
    for lrs in pool2.run(rank_drifts, str(tmp_path / "gamma"), *settings):
        assert lrs == pytest.approx([0.002] * 5 + [0.0002] * 3)


def test_what_cannot_be_overridden():
    with pytest.raises(ConfigError, match="cannot let vocab_size through"):
        NeuronXLAStrategy(resume_override=["vocab_size"])
    with pytest.raises(ConfigError, match="must be a list of keys"):
        NeuronXLAStrategy(resume_override="lr")
    with pytest.raises(ConfigError, match="vocab_size: 1 in the checkpoint, 2 now"):
        drift.check({"vocab_size": 1}, {"vocab_size": 2}, ["*"])


class Poison(Callback):
    """NaN or infinity in what one rank alone computes, or in its optimizer state."""

    def __init__(self, rank, step, where, value):
        self.rank, self.step, self.where, self.value = rank, step, where, value

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and trainer.global_rank == self.rank and self.where == "data":
            batch[0].fill_(self.value)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and trainer.global_rank == self.rank and self.where == "state":
            piece = trainer.optimizers[0].export_state()[0]
            piece.tensors["exp_avg_sq"][0] = self.value


def rank_blows_up(folder, poison, strategy):
    saving = NeuronModelCheckpoint(folder, every_n_train_steps=2, save_top_k=1, filename="{step}")
    try:
        with pytest.raises(CheckpointError) as caught:
            run(Noisy, strategy, saving, callbacks=[poison], max_steps=20)
        return str(caught.value), list(steps_in(folder)), saving.best_model_path
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize(
    ("poison", "strategy", "said"),
    [
        (Poison(1, 3, "data", float("nan")), {"zero1": True}, "the weights up.weight holds"),
        (
            Poison(0, 3, "data", float("inf")),
            {"zero1": True, "async_save": True},
            "the weights up.weight holds",
        ),
        (Poison(1, 4, "state", float("inf")), {"zero1": True}, "rank 1 .*the optimizer state exp_avg_sq of"),
    ],
)
def test_what_is_not_finite_is_not_saved(pool2, tmp_path, poison, strategy, said):
    results = pool2.run(rank_blows_up, str(tmp_path), poison, strategy)
    assert len(set(map(str, results))) == 1
    message, steps, best = results[0]
    assert pytest.importorskip("re").search(said, message), message
    assert "NaN or infinite at step 4" in message
    assert steps == [2]
    assert best == f"{tmp_path}/step=2.ckpt"


class Unstorable(Callback):
    """Its state is an object."""

    def state_dict(self):
        return {"made": object()}


def rank_has_unstorable_state(folder):
    saving = NeuronModelCheckpoint(folder, every_n_train_steps=2)
    module = None
    try:
        with pytest.raises(CheckpointError) as caught:
            module = run(Noisy, {}, saving, callbacks=[Unstorable()], max_steps=4)
        assert module is None
        return str(caught.value), [name for name in os.listdir(folder) if name[0] != "."]
    finally:
        parallel_state.destroy_model_parallel()


def test_state_that_cannot_be_stored_is_found_before_the_first_step(pool2, tmp_path):
    for message, names in pool2.run(rank_has_unstorable_state, str(tmp_path)):
        assert "trainer state.callbacks.Unstorable.made" in message
        assert names == []


def test_masks_of_infinities_are_no_blow_up(tmp_path):
    try:
        saving = NeuronModelCheckpoint(str(tmp_path), every_n_train_steps=2, filename="{step}")
        run(Masked, {}, saving, max_steps=2)
        assert torch.isinf(checkpoint.read_full_state(tmp_path / "step=2.ckpt")["mask"]).all()
    finally:
        parallel_state.destroy_model_parallel()


class Masked(Noisy):
    """A buffer that holds infinities on purpose."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((2, 2), float("-inf")))


class Curved(Tunable):
    """A schedule that is a function: nothing of it is in its state."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        length = 100 * self.gamma
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.1, 1 - step / length))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_a_schedule_that_is_a_function_is_compared_by_its_values(tmp_path):
    saving = NeuronModelCheckpoint(str(tmp_path), every_n_train_steps=2, filename="{step}")
    try:
        run(lambda: Curved(gamma=1), {}, saving, max_steps=2)
        with pytest.raises(
            ConfigError, match=r"(?s)scheduler\.0\.lambda0: \[0\.99, 0\.9, .*resume_override=\['scheduler'\]"
        ):
            run(lambda: Curved(gamma=2), {}, saving, ckpt_path="last", max_steps=4)
        override = {"resume_override": ["scheduler"]}
        _, module, _ = run(lambda: Curved(gamma=2), override, saving, ckpt_path="last", max_steps=4)
        assert module.lrs == pytest.approx([0.02 * (1 - 3 / 200), 0.02 * (1 - 4 / 200)])
    finally:
        parallel_state.destroy_model_parallel()
