"""Saving beside training: the same checkpoints, errors at the next step on all ranks, nothing deleted too early."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from neuron_lightning import AsyncSave, NeuronModelCheckpoint, NeuronXLAStrategy, checkpoint, parallel_state
from neuron_lightning.checkpoint import points
from neuron_lightning.errors import CheckpointError, ConfigError
from tests.dist import strategy_cases as cases
from tests.dist.test_model_checkpoint import Scored, ScoredManual, run, steps_in

ASYNC = {"zero1": True, "async_save": True}


def visible(folder):
    return sorted(name for name in os.listdir(folder) if name[0] != ".")


def rank_saves_beside(folder, kind, budget, options):
    arguments = {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"}
    strategy = {"zero1": True, "async_save": AsyncSave(memory_budget_gib=budget)}
    try:
        _, plain, logger = run(
            kind, {"zero1": True}, NeuronModelCheckpoint(f"{folder}/sync", **arguments), **options
        )
        saving = NeuronModelCheckpoint(f"{folder}/async", **arguments)
        trainer, module, _ = run(kind, strategy, saving, **options)
        for name, value in cases.trained(plain).items():
            assert torch.equal(cases.trained(module)[name], value), name
        assert steps_in(f"{folder}/async") == steps_in(f"{folder}/sync") == [3, 6, 9]
        for step in (3, 6, 9):
            first, second = (
                checkpoint.read_full_state(f"{folder}/{k}/step={step}.ckpt") for k in ("sync", "async")
            )
            assert all(torch.equal(first[name], second[name]) for name in first)
        assert saving.best_model_path == trainer.strategy.last_saved == f"{folder}/async/step=9.ckpt"
        _, resumed, later = run(
            kind, strategy, NeuronModelCheckpoint(f"{folder}/again", **arguments),
            ckpt_path=f"{folder}/async/step=6.ckpt", **options,
        )  # fmt: skip
        for name, value in cases.trained(plain).items():
            assert torch.equal(cases.trained(resumed)[name], value), name
        assert later.records == [record for record in logger.records if record[0] > 6]
        return [thread.name for thread in threading.enumerate() if "checkpoint" in thread.name]
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("kind", [Scored, ScoredManual])
@pytest.mark.parametrize("budget", [None, 1e-9])
def test_the_same_checkpoints_as_without(pool2, tmp_path, kind, budget):
    assert pool2.run(rank_saves_beside, str(tmp_path), kind, budget, {"max_steps": 10}) == [[], []]


class NoNewGroups(Callback):
    """Refuses process groups that are made while training: with a lost peer their making waits for ever."""

    def on_train_start(self, trainer, pl_module):
        self.new_group, dist.new_group = dist.new_group, self.refuse

    def on_train_end(self, trainer, pl_module):
        dist.new_group = self.new_group

    def refuse(self, *args, **kwargs):
        raise AssertionError("a process group is made during training")


def rank_no_new_groups(folder):
    saving = NeuronModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    try:
        run(Scored, ASYNC, saving, max_steps=6, callbacks=[NoNewGroups()])
        return steps_in(folder)
    finally:
        parallel_state.destroy_model_parallel()


def test_the_first_save_makes_no_process_group(pool2, tmp_path):
    assert pool2.run(rank_no_new_groups, str(tmp_path)) == [[2, 4, 6], [2, 4, 6]]


class Watch(Callback):
    """What is there, and what the callbacks name, at the start of every batch."""

    def __init__(self, folder):
        self.folder, self.seen, self.steps = folder, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        named = [c.best_model_path for c in trainer.checkpoint_callbacks] + [trainer.strategy.last_saved]
        self.seen.append([path for path in named if path and not checkpoint.is_checkpoint(path)])
        self.steps.append(trainer.global_step)


def rank_slow_writes(folder, stock):
    """The save of step 4 ends only when step 6 is trained on."""
    watch, began, state = Watch(folder), threading.Event(), {}
    arguments = {"every_n_train_steps": 2, "filename": "{step}"}
    saving = (ModelCheckpoint if stock else NeuronModelCheckpoint)(folder, **arguments)
    saves = []

    def hold():
        saves.append(len(watch.steps))
        if len(saves) == 2:
            while watch.steps[-1] < 6 and not began.is_set():
                time.sleep(0.01)
            state["kept meanwhile"] = visible(folder)

    points.on("manifest_written", hold)
    release = Release(began)
    try:
        run(Scored, ASYNC, saving, callbacks=[watch, release], max_steps=5)
        return watch.seen, state.get("kept meanwhile"), visible(folder)
    finally:
        points.clear()
        parallel_state.destroy_model_parallel()


class Release(Callback):
    """Lets the write go on when all training steps are over: the end of fit has to wait for it."""

    def __init__(self, event):
        self.event = event

    def on_train_end(self, trainer, pl_module):
        self.event.set()


@pytest.mark.parametrize("stock", [False, True])
def test_nothing_is_deleted_or_named_before_the_commit(pool2, tmp_path, stock):
    (named, meanwhile, after), _ = pool2.run(rank_slow_writes, str(tmp_path), stock)
    assert "step=2.ckpt" in meanwhile  # still there while the next one is written
    assert "step=4.ckpt" not in meanwhile
    assert after == ["step=4.ckpt"]
    if not stock:
        assert named == [[]] * len(named)


def rank_fails_to_write(folder, failing):
    watch = Watch(folder)
    saving = NeuronModelCheckpoint(folder, every_n_train_steps=2, save_top_k=1, filename="{step}")
    written = []

    def full():
        written.append(1)
        if len(written) > 1 and int(os.environ["RANK"]) == failing:
            raise OSError(28, "No space left on device")

    points.on("share_written", full)
    try:
        with pytest.raises(CheckpointError) as caught:
            run(Scored, ASYNC, saving, callbacks=[watch], max_steps=100)
        return str(caught.value), watch.steps[-1], visible(folder), saving.best_model_path
    finally:
        points.clear()
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_surfaces_at_a_step_on_all_ranks(pool2, tmp_path, failing):
    results = pool2.run(rank_fails_to_write, str(tmp_path), failing)
    assert len({(message, step) for message, step, _, _ in results}) == 1
    message, step, names, best = results[0]
    assert "No space left on device" in message
    assert f"rank {failing}" in message
    assert 4 <= step <= 6  # at the latest by the next save
    assert names == ["step=2.ckpt"]
    assert best == f"{tmp_path}/step=2.ckpt"


class Raises(Callback):
    """One rank fails right after a save has begun."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            raise ValueError("bad data")


def rank_raises(folder):
    saving = NeuronModelCheckpoint(folder, every_n_train_steps=2, filename="{step}")
    points.on("share_written", lambda: time.sleep(0.3))
    try:
        with pytest.raises(ValueError, match="bad data"):
            run(Scored, ASYNC, saving, callbacks=[Raises()], max_steps=10)
        return steps_in(folder)
    finally:
        points.clear()
        parallel_state.destroy_model_parallel()


def test_an_exception_lets_the_write_in_flight_end(pool2, tmp_path):
    assert pool2.run(rank_raises, str(tmp_path)) == [[2], [2]]


def test_what_async_save_can_be():
    assert NeuronXLAStrategy()._async_save is None
    assert NeuronXLAStrategy(async_save=AsyncSave(memory_budget_gib=2))._async_save.memory_budget == 2 << 30
    with pytest.raises(ConfigError, match="greater than 0"):
        AsyncSave(memory_budget_gib=0)
    with pytest.raises(ConfigError, match="must be True, False or AsyncSave"):
        NeuronXLAStrategy(async_save="yes")
