"""NeuronModelCheckpoint: when it saves, what it keeps, and that a resumed run cannot be told from an uninterrupted one."""

from __future__ import annotations

import os
import shutil
import signal
import time
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from neuron_lightning import NeuronModelCheckpoint, NeuronXLAStrategy, checkpoint, parallel_state
from neuron_lightning.errors import ConfigError
from neuron_lightning.lightning.callbacks.retention import Saved, Shelf
from tests.dist import strategy_cases as cases
from tests.dist.test_strategy_resume import Noisy, NoisyManual

SCORES = [5.0, 3.0, 4.0, 1.0, 6.0, 2.0, 7.0, 8.0]
"""Monitored value by step, from step 1 on; lower is better."""


class Scored(Noisy):
    """Logs the score of a step in its own ``on_train_batch_end``, which runs after the callbacks'."""

    def on_train_batch_end(self, *args):
        if self.trainer.global_step:
            self.log("score", SCORES[(self.trainer.global_step - 1) % 8])


class ScoredManual(NoisyManual):
    """The same under manual optimization, two micro-batches a step."""

    on_train_batch_end = Scored.on_train_batch_end


def run(kind, strategy, saving, ckpt_path=None, callbacks=(), val=False, **options):
    module, logger = cases.new(kind), cases.Records()
    trainer = Trainer(
        strategy=NeuronXLAStrategy(**strategy), logger=logger, precision="32-true", callbacks=[saving, *callbacks],
        **{"max_epochs": -1, "log_every_n_steps": 1, **cases.QUIET, "enable_checkpointing": True, **options},
    )  # fmt: skip
    dp = trainer.world_size // trainer.strategy.tensor_parallel_size
    loader = DataLoader(cases.dataset(torch.float32), batch_size=4 // dp, shuffle=True)
    trainer.fit(module, loader, loader if val else None, ckpt_path=ckpt_path)
    return trainer, module, logger


def steps_in(folder):
    return [info.step for info in checkpoint.list_checkpoints(folder)]


def rank_keeps(folder, kind, arguments, options):
    saving = NeuronModelCheckpoint(folder, **arguments)
    try:
        trainer, _, _ = run(kind, {"zero1": True}, saving, **options)
        trainer.strategy.barrier()
        best = {os.path.basename(path): float(score) for path, score in saving.best_k_models.items()}
        names = sorted(name for name in os.listdir(folder) if name[0] != ".")  # rank 0 may hold the lock
        return steps_in(folder), best, os.path.basename(saving.best_model_path), names
    finally:
        parallel_state.destroy_model_parallel()


KEEPS = [
    (Scored, {"every_n_train_steps": 1, "monitor": "score", "save_top_k": 2, "filename": "{step}"}, [4, 6]),
    (ScoredManual, {"every_n_train_steps": 1, "monitor": "score", "save_top_k": 2, "filename": "{step}"}, [4, 6]),
    (Scored, {"every_n_train_steps": 2, "save_top_k": 3, "filename": "{step}"}, [4, 6, 8]),
    (ScoredManual, {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"}, [3, 6]),
    (Scored, {"every_n_train_steps": 1, "monitor": "score", "save_last": True, "filename": "{step}"}, [4, 8]),
    (ScoredManual, {"train_time_interval": timedelta(0), "save_top_k": 2, "filename": "{step}"}, [7, 8]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "arguments", "expected"), KEEPS)
def test_what_is_kept(pool2, tmp_path, kind, arguments, expected):
    folder = str(tmp_path / "ckpt")
    for steps, best, best_path, names in pool2.run(rank_keeps, folder, kind, arguments, {"max_steps": 8}):
        assert steps == expected
        extra = ["last.ckpt"] if arguments.get("save_last") else []
        assert names == sorted([f"step={step}.ckpt" for step in expected] + extra)
        if "monitor" in arguments:
            wanted = expected if not extra else expected[:1]
            assert best == {
                f"step={step}.ckpt": SCORES[step - 1] for step in wanted
            }  # its own step's, not one stale
            assert best_path == "step=4.ckpt"
        else:
            assert best_path == f"step={expected[-1]}.ckpt"
        if extra:
            assert os.readlink(f"{folder}/last.ckpt") == "step=8.ckpt"


def rank_resumes(folder, kind, arguments, options, kill_at):
    """A whole run, and one that is resumed from each of its checkpoints in a copy of the folder."""
    try:
        saving = NeuronModelCheckpoint(f"{folder}/whole", save_top_k=-1, filename="{step}", **arguments)
        whole, module, logger = run(kind, {"zero1": True}, saving, **options)
        found = []
        for info in checkpoint.list_checkpoints(f"{folder}/whole"):
            other = NeuronModelCheckpoint(
                f"{folder}/{info.step}", save_top_k=-1, filename="{step}", **arguments
            )
            again, resumed, later = run(kind, {"zero1": True}, other, ckpt_path=info.path, **options)
            assert again.global_step == whole.global_step
            assert (
                again.current_epoch == whole.current_epoch or info.step == whole.global_step
            )  # nothing left to do
            for name, value in cases.trained(module).items():
                assert torch.equal(cases.trained(resumed)[name], value), (info.step, name)
            assert later.records == [r for r in logger.records if r[0] > info.step], info.step
            assert module.seen[len(module.seen) - len(resumed.seen) :] == resumed.seen, info.step
            assert steps_in(f"{folder}/{info.step}") == [
                s for s in steps_in(f"{folder}/whole") if s > info.step
            ]
            found.append(info.step)
        return found
    finally:
        parallel_state.destroy_model_parallel()


RESUMES = [
    (Scored, {"every_n_train_steps": 4}, {"max_steps": 12}, [4, 8, 12]),  # 8 is the end of an epoch
    (Scored, {"every_n_train_steps": 2}, {"max_epochs": 2, "accumulate_grad_batches": 2}, [2, 4, 6, 8]),
    (ScoredManual, {"every_n_train_steps": 3}, {"max_steps": 10}, [3, 6, 9]),
    (ScoredManual, {"every_n_epochs": 1}, {"max_epochs": 3}, [4, 8, 12]),
    (Scored, {"every_n_train_steps": 4}, {"max_steps": 10, "val": True, "val_check_interval": 4}, [4, 8]),
]


@pytest.mark.parametrize(("kind", "arguments", "options", "expected"), RESUMES)
def test_a_run_resumed_at_any_boundary_is_bit_identical(pool2, tmp_path, kind, arguments, options, expected):
    assert pool2.run(rank_resumes, str(tmp_path), kind, arguments, options, None) == [expected] * 2


def rank_resumes_after_fit(folder, kind, with_steps):
    """``trainer.save_checkpoint`` after a fit that ended inside an epoch, and a longer fit from there."""
    try:
        saving = NeuronModelCheckpoint(f"{folder}/ckpt", every_n_train_steps=100)
        _, module, _ = run(kind, {"zero1": True}, saving, max_steps=11)
        short, _, _ = run(kind, {"zero1": True}, saving, max_steps=with_steps)
        short.save_checkpoint(f"{folder}/end")
        again, resumed, _ = run(kind, {"zero1": True}, saving, ckpt_path=f"{folder}/end", max_steps=11)
        for name, value in cases.trained(module).items():
            assert torch.equal(cases.trained(resumed)[name], value), name
        return again.global_step
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("kind", [Scored, ScoredManual])
@pytest.mark.parametrize("steps", [5, 8])
def test_a_checkpoint_of_after_a_fit_goes_on_where_it_ended(pool2, tmp_path, kind, steps):
    assert pool2.run(rank_resumes_after_fit, str(tmp_path), kind, steps) == [11, 11]


def rank_stock_epochs(folder, options):
    """Lightning's own callback saves in ``on_train_epoch_end``."""
    try:
        saving = ModelCheckpoint(f"{folder}/whole", save_top_k=-1, filename="{step}")
        _, module, logger = run(Scored, {"zero1": True}, saving, **options)
        again, resumed, later = run(
            Scored, {"zero1": True}, ModelCheckpoint(f"{folder}/again", save_top_k=-1),
            ckpt_path=f"{folder}/whole/step=8.ckpt", **options,
        )  # fmt: skip
        for name, value in cases.trained(module).items():
            assert torch.equal(cases.trained(resumed)[name], value), name
        assert module.seen[len(module.seen) - len(resumed.seen) :] == resumed.seen
        assert later.records == [r for r in logger.records if r[0] > 8]
        return again.global_step
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("options", [{"max_steps": 12}, {"max_epochs": 2}])
def test_the_end_of_an_epoch_is_not_its_middle(pool2, tmp_path, options):
    steps = 12 if "max_steps" in options else 16
    assert pool2.run(rank_stock_epochs, str(tmp_path), options) == [steps] * 2


class Validated(Scored):
    """A validation metric that falls and rises again."""

    def validation_step(self, batch, batch_idx):
        self.log("val_score", SCORES[self.trainer.global_step - 1] if self.trainer.global_step else 0.0)


def rank_monitors_validation(folder):
    saving = NeuronModelCheckpoint(
        folder, monitor="val_score", every_n_train_steps=1, save_top_k=-1, filename="{step}"
    )
    try:
        trainer, _, _ = run(Validated, {}, saving, max_steps=8, val=True, val_check_interval=4)
        trainer.strategy.barrier()
        return {os.path.basename(path): float(score) for path, score in saving.best_k_models.items()}
    finally:
        parallel_state.destroy_model_parallel()


def test_a_validation_metric_is_of_the_step_that_is_saved(pool2, tmp_path):
    expected = {f"step={step}.ckpt": SCORES[step - 1] for step in (4, 8)}
    assert pool2.run(rank_monitors_validation, str(tmp_path)) == [expected] * 2


class Terminate(Callback):
    """SIGTERM to one rank, or to all."""

    def __init__(self, ranks, step):
        self.ranks, self.step = ranks, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and trainer.global_rank in self.ranks:
            os.kill(os.getpid(), signal.SIGTERM)


def rank_is_terminated(folder, ranks, kind, stock):
    before = signal.getsignal(signal.SIGTERM)
    make = ModelCheckpoint if stock else NeuronModelCheckpoint
    saving = make(f"{folder}/ckpt", every_n_train_steps=100, filename="{step}")
    try:
        whole = run(kind, {"zero1": True}, make(f"{folder}/whole", every_n_train_steps=100), max_steps=10)
        began = time.monotonic()
        strategy = {"zero1": True, "async_save": ranks == [1]}
        with pytest.raises(SIGTERMException):
            run(kind, strategy, saving, callbacks=[Terminate(ranks, 5)], max_steps=10)
        took = time.monotonic() - began
        # rank 0 may hold the lock
        names = sorted(name for name in os.listdir(f"{folder}/ckpt") if name[0] != ".")
        _, resumed, _ = run(
            kind, {"zero1": True}, saving, ckpt_path=f"{folder}/ckpt/{names[0]}", max_steps=10
        )
        for name, value in cases.trained(whole[1]).items():
            assert torch.equal(cases.trained(resumed)[name], value), name
        return names, took
    finally:
        signal.signal(signal.SIGTERM, before)
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("ranks", [[1], [0], [0, 1]])
@pytest.mark.parametrize("kind", [Scored, ScoredManual])
def test_sigterm_saves_one_checkpoint_and_ends_all_ranks(pool2, tmp_path, ranks, kind):
    stock = ranks == [0]
    for names, took in pool2.run(rank_is_terminated, str(tmp_path), ranks, kind, stock):
        assert names == ["step=6.ckpt"]
        assert took < 30


def rank_loses_retention(folder):
    """A crash between a commit and the deletions that follow it; then the run is resumed."""
    arguments = {"every_n_train_steps": 2, "save_top_k": 2, "filename": "{step}"}
    try:
        trainer, _, _ = run(Scored, {"zero1": True}, NeuronModelCheckpoint(folder, **arguments), max_steps=6)
        if trainer.is_global_zero:
            shutil.copytree(f"{folder}/step=4.ckpt", f"{folder}/step=2.ckpt")  # as if it had not been deleted
        trainer.strategy.barrier()
        before = steps_in(folder) if trainer.is_global_zero else None
        resumed, _, _ = run(
            Scored, {"zero1": True}, NeuronModelCheckpoint(folder, **arguments),
            ckpt_path=f"{folder}/step=6.ckpt", max_steps=7,
        )  # fmt: skip
        resumed.strategy.barrier()
        return before, sorted(name for name in os.listdir(folder) if name[0] != ".")
    finally:
        parallel_state.destroy_model_parallel()


def test_deletions_that_a_crash_prevented_are_made_on_resume(pool2, tmp_path):
    (before, names), _ = pool2.run(rank_loses_retention, str(tmp_path))
    assert before == [4, 4, 6]
    assert names == ["step=4.ckpt", "step=6.ckpt"]


def test_the_shelf_keeps_the_best_and_the_newest():
    shelf = Shelf()
    for step, score in enumerate(SCORES, 1):
        ranked = shelf.admits(score, limit=2, mode="max")
        saved = Saved(path=f"/x/{step}", step=step, score=score if ranked else None)
        shelf = shelf.with_saved(saved, limit=2, mode="max", ranked=ranked, keep_newest=True)
        assert len(shelf.kept) <= 3
    assert [one.step for one in shelf.best] == [8, 7]
    assert shelf.newest.step == 8
    assert Shelf.from_state(shelf.state()) == shelf
    assert [one.path for one in shelf.moved("/x", "/y/z/").kept] == ["/y/z/8", "/y/z/7"]
    assert shelf.moved("/elsewhere", "/y").kept == ()
    assert [one.step for one in shelf.only({"/x/7"}).kept] == [7]


def test_what_cannot_be_asked_for():
    with pytest.raises(ConfigError, match="all ranks write a checkpoint together"):
        NeuronModelCheckpoint(save_on_exception=True)
    with pytest.raises(ConfigError, match="not -2"):
        NeuronModelCheckpoint(save_top_k=-2)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=1, logger=False, callbacks=[NeuronModelCheckpoint("x")],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="needs NeuronXLAStrategy, not SingleDeviceStrategy"):
        trainer.fit(cases.new(cases.Mlp), DataLoader(cases.dataset(torch.float32), batch_size=8))


def rank_misses_metric(folder):
    saving = NeuronModelCheckpoint(folder, monitor="nothing", every_n_train_steps=2)
    try:
        with pytest.raises(ConfigError, match=r"nothing of that name is logged; there are .*score") as caught:
            run(Scored, {}, saving, max_steps=20)
        return str(caught.value)
    finally:
        parallel_state.destroy_model_parallel()


def test_a_metric_that_nobody_logs_is_an_error_after_one_epoch(pool2, tmp_path):
    assert len(set(pool2.run(rank_misses_metric, str(tmp_path)))) == 1


def rank_resumed_at_the_end(folder):
    """A crash right after the last commit leaves a checkpoint that should be gone; the resumed run trains no step."""
    saving = {"every_n_train_steps": 1, "save_top_k": 2, "filename": "{step}"}
    try:
        trainer, _, _ = run(Scored, {"zero1": True}, NeuronModelCheckpoint(folder, **saving), max_steps=3)
        if trainer.is_global_zero:
            shutil.copytree(f"{folder}/step=2.ckpt", f"{folder}/step=1.ckpt")
        trainer.strategy.barrier()
        again = NeuronModelCheckpoint(folder, **saving)
        trainer, _, _ = run(Scored, {"zero1": True}, again, ckpt_path=f"{folder}/step=3.ckpt", max_steps=3)
        trainer.strategy.barrier()
        return trainer.global_step, sorted(name for name in os.listdir(folder) if name[0] != ".")
    finally:
        parallel_state.destroy_model_parallel()


def test_deletions_are_finished_by_a_run_with_nothing_left_to_train(pool2, tmp_path):
    expected = (3, ["step=2.ckpt", "step=3.ckpt"])
    assert pool2.run(rank_resumed_at_the_end, str(tmp_path)) == [expected, expected]
