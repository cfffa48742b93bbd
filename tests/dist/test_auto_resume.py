"""Which checkpoint a run goes on from, and that no second job gets at its folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from neuron_lightning import NeuronModelCheckpoint, NeuronXLAStrategy, checkpoint, parallel_state
from neuron_lightning.errors import CheckpointError, ConfigError
from neuron_lightning.lightning.folder_lock import LOCK_FILE
from tests.dist import strategy_cases as cases
from tests.dist.test_model_checkpoint import Scored, run, steps_in

ROOT = Path(__file__).resolve().parents[2]


def keeper(folder, **arguments):
    return NeuronModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}", **arguments)


def flip(path):
    """One bit in the middle of a file."""
    data = bytearray(Path(path).read_bytes())
    data[len(data) // 2] ^= 4
    Path(path).write_bytes(data)


def rank_auto_resumes(folder, damage):
    """Six steps, damage, then a second job that means to make ten; a whole run for comparison."""
    try:
        whole = run(Scored, {"zero1": True}, keeper(f"{folder}/whole"), max_steps=10)[1]
        auto = {"zero1": True, "auto_resume": True}
        first, _, _ = run(Scored, auto, keeper(f"{folder}/ckpt"), max_steps=6)
        assert first.ckpt_path is None
        if first.is_global_zero:
            os.utime(f"{folder}/ckpt/step=2.ckpt")  # the oldest is the newest by its time
            for name in damage:
                flip(f"{folder}/ckpt/{name}")
            shutil.copytree(f"{folder}/ckpt/step=2.ckpt", f"{folder}/ckpt/step=9.ckpt.tmp")
        first.strategy.barrier()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again, resumed, later = run(Scored, auto, keeper(f"{folder}/ckpt"), max_steps=10)
        for name, value in cases.trained(whole).items():
            assert torch.equal(cases.trained(resumed)[name], value), name
        said = [str(w.message) for w in caught if "auto_resume" in str(w.message)]
        return os.path.basename(str(again.ckpt_path)), said, later.steps, steps_in(f"{folder}/ckpt")
    finally:
        parallel_state.destroy_model_parallel()


SHARD = "rank-00001.model.safetensors"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ([], 6),
        ([f"step=6.ckpt/{SHARD}"], 4),
        (["step=6.ckpt/manifest.json"], 4),
        (["step=6.ckpt/trainer.json", f"step=4.ckpt/{SHARD}"], 2),
    ],
)
def test_the_newest_intact_checkpoint_is_found(pool2, tmp_path, damage, expected):
    results = pool2.run(rank_auto_resumes, str(tmp_path), damage)
    for path, _, logged, _ in results:
        assert path == f"step={expected}.ckpt"
        assert logged == list(range(expected + 1, 11))
    warned = results[0][1]
    assert len(warned) == (1 if damage else 0)
    assert results[1][1] == []
    if damage:
        assert damage[0] in warned[0]
        assert f"goes on from {tmp_path}/ckpt/step={expected}.ckpt (step {expected})" in warned[0]
    assert max(results[0][3]) == 10


def rank_finds_all_damaged(folder):
    try:
        auto = {"auto_resume": True}
        trainer, _, _ = run(Scored, auto, keeper(folder), max_steps=4)
        if trainer.is_global_zero:
            flip(f"{folder}/step=2.ckpt/{SHARD}")
            flip(f"{folder}/step=4.ckpt/{SHARD}")
        trainer.strategy.barrier()
        with pytest.raises(CheckpointError, match=r"none of the 2 checkpoint.*step=4.*choose another folder"):
            run(Scored, auto, keeper(folder), max_steps=6)
        return steps_in(folder)
    finally:
        parallel_state.destroy_model_parallel()


def test_nothing_but_damaged_checkpoints_is_an_error_and_not_a_fresh_start(pool2, tmp_path):
    assert pool2.run(rank_finds_all_damaged, str(tmp_path)) == [[2, 4]] * 2


def rank_chooses(folder, make):
    """``last`` is the highest step, ``best`` is known to a new process, a path beats ``auto_resume``."""
    try:
        arguments = {"monitor": "score", "every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"}
        saving = make(folder, **arguments)
        trainer, _, _ = run(Scored, {}, saving, max_steps=8)
        if trainer.is_global_zero:
            os.utime(f"{folder}/step=2.ckpt")
        trainer.strategy.barrier()
        found = {}
        for wish in ("last", "best", f"{folder}/step=6.ckpt"):
            again, _, _ = run(
                Scored, {"auto_resume": True}, make(folder, **arguments), ckpt_path=wish, max_steps=8
            )
            found[wish] = os.path.basename(again.ckpt_path)
        fresh, _, _ = run(Scored, {}, make(f"{folder}/empty", **arguments), ckpt_path="last", max_steps=1)
        assert fresh.ckpt_path is None
        return found
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("make", [NeuronModelCheckpoint, ModelCheckpoint])
def test_last_best_and_a_path(pool2, tmp_path, make):
    for found in pool2.run(rank_chooses, str(tmp_path), make):
        assert found["last"] == "step=8.ckpt"
        assert found[f"{tmp_path}/step=6.ckpt"] == "step=6.ckpt"
        if make is NeuronModelCheckpoint:  # the scores that Lightning's own sees are one step old
            assert found["best"] == "step=4.ckpt"


def test_auto_resume_needs_a_folder_that_is_the_same_in_every_run(tmp_path):
    with pytest.raises(ConfigError, match="none has a dirpath"):
        run(
            Scored,
            {"auto_resume": True},
            NeuronModelCheckpoint(),
            max_steps=1,
            default_root_dir=str(tmp_path),
        )


def test_of_two_names_for_one_step_the_later_version_counts(tmp_path):
    try:
        run(Scored, {}, keeper(str(tmp_path)), max_steps=2)
        shutil.copytree(tmp_path / "step=2.ckpt", tmp_path / "step=2-v1.ckpt")
        assert len(checkpoint.list_checkpoints(tmp_path)) == 2
        again, _, _ = run(Scored, {"auto_resume": True}, keeper(str(tmp_path)), max_steps=2)
        assert again.ckpt_path == f"{tmp_path}/step=2-v1.ckpt"
    finally:
        parallel_state.destroy_model_parallel()


def test_a_folder_in_an_object_store(tmp_path):
    """No links and no locks there; everything else as on a disk."""
    folder = f"memory://{tmp_path.name}/ckpt"
    arguments = {
        "monitor": "score",
        "every_n_train_steps": 2,
        "save_top_k": 1,
        "save_last": True,
        "filename": "{step}",
    }
    try:
        run(Scored, {"auto_resume": True}, NeuronModelCheckpoint(folder, **arguments), max_steps=8)
        assert steps_in(folder) == [4, 8]
        saving = NeuronModelCheckpoint(folder, **arguments)
        again, _, _ = run(Scored, {"auto_resume": True, "async_save": True}, saving, max_steps=12)
        assert again.ckpt_path == f"{folder}/step=8.ckpt"
        assert steps_in(folder) == [4, 12]
        assert (saving.best_model_path, saving.last_model_path) == (
            f"{folder}/step=4.ckpt",
            f"{folder}/step=12.ckpt",
        )
    finally:
        parallel_state.destroy_model_parallel()


HOLDER = """
import sys, time
from neuron_lightning.lightning.folder_lock import FolderLocks
locks = FolderLocks()
locks.acquire([sys.argv[1]])
print("held", flush=True)
time.sleep(600)
"""


def rank_meets_another_job(folder):
    try:
        began = time.monotonic()
        with pytest.raises(CheckpointError) as caught:
            run(Scored, {}, keeper(folder), max_steps=2)
        return str(caught.value), time.monotonic() - began
    finally:
        parallel_state.destroy_model_parallel()


def rank_trains(folder):
    try:
        run(Scored, {}, keeper(folder), max_steps=2)
        return steps_in(folder), sorted(os.listdir(folder))
    finally:
        parallel_state.destroy_model_parallel()


def test_a_folder_in_use_by_another_job_is_refused_on_all_ranks(pool2, tmp_path):
    folder = str(tmp_path / "ckpt")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        for message, took in pool2.run(rank_meets_another_job, folder):
            assert f"{folder} is in use by another job (process {holder.pid} on " in message
            assert took < 30
    finally:
        holder.kill()
        holder.wait()
    assert LOCK_FILE in os.listdir(folder)  # a killed job leaves the file, and not the lock
    for steps, names in pool2.run(rank_trains, folder):
        assert steps == [2]
        assert names in (["step=2.ckpt"], ["step=2.ckpt", LOCK_FILE], [LOCK_FILE, "step=2.ckpt"])
    assert sorted(os.listdir(folder)) == ["step=2.ckpt"]


def test_settings_of_the_strategy_say_auto_resume():
    assert NeuronXLAStrategy(auto_resume=True)._auto_resume is True
