"""What a folder of checkpoints holds, whole-checkpoint verification, and the points where tests step in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch import nn

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint import commit, points
from neuron_lightning.errors import CheckpointError
from tests.unit.test_checkpoint_folder import Model, load, same, save


def at_step(path: Path, step: int | None, seed: int = 0) -> None:
    save(path, Model(seed), trainer_state={} if step is None else {"global_step": step, "epoch": step // 10})


def steps(parent: Path) -> list[int | None]:
    return [info.step for info in checkpoint.list_checkpoints(parent)]


def test_committed_checkpoints_come_by_step_and_nothing_else_does(tmp_path: Path) -> None:
    for name, step in (("a", 30), ("b", 4), ("c", 100)):
        at_step(tmp_path / name, step)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "last").symlink_to(tmp_path / "c")
    (tmp_path / "b").rename(tmp_path / "d.tmp")
    infos = checkpoint.list_checkpoints(str(tmp_path))
    assert [(i.step, i.epoch, i.path, i.damage) for i in infos] == [
        (30, 3, str(tmp_path / "a"), None),
        (100, 10, str(tmp_path / "c"), None),
    ]


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert checkpoint.list_checkpoints(tmp_path / "no") == []


def test_one_that_is_half_replaced_is_listed_under_its_name(tmp_path: Path) -> None:
    at_step(tmp_path / "step=3.ckpt", 3)
    (tmp_path / "step=3.ckpt").rename(commit.replaced(tmp_path / "step=3.ckpt"))
    (info,) = checkpoint.list_checkpoints(tmp_path)
    assert (info.step, info.path) == (3, str(tmp_path / "step=3.ckpt"))
    other = Model(1)
    load(Path(info.path), other)
    assert same(other, Model(0))


def test_a_damaged_manifest_is_listed_with_the_reason(tmp_path: Path) -> None:
    for name, step in (("a", 30), ("step=4", 4), ("c", 50)):
        at_step(tmp_path / name, step)
    raw = (tmp_path / "a" / "manifest.json").read_bytes()
    (tmp_path / "a" / "manifest.json").write_bytes(raw.replace(b'"epoch":3', b'"epoch":2'))
    (tmp_path / "step=4" / "manifest.json").write_bytes(b"")
    infos = checkpoint.list_checkpoints(tmp_path)
    assert [i.step for i in infos] == [4, 30, 50]
    assert "damaged" in str(infos[0].damage)
    assert "does not match its own digest" in str(infos[1].damage)
    assert infos[2].damage is None


def test_damage_that_hides_the_step_counts_as_the_newest(tmp_path: Path) -> None:
    at_step(tmp_path / "a", 30)
    at_step(tmp_path / "b", None)
    at_step(tmp_path / "z", 5)
    (tmp_path / "z" / "manifest.json").write_bytes(b"")
    assert steps(tmp_path) == [None, 30, None]


def test_verify_names_the_file_of_any_kind(tmp_path: Path) -> None:
    save(tmp_path / "a", Model(), rank_state={"n": 7})
    checkpoint.verify_checkpoint(tmp_path / "a")
    for name in sorted(f.name for f in (tmp_path / "a").iterdir()):
        original = (tmp_path / "a" / name).read_bytes()
        damaged = bytearray(original)
        damaged[len(damaged) // 2] ^= 4
        (tmp_path / "a" / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name):
            checkpoint.verify_checkpoint(tmp_path / "a")
        (tmp_path / "a" / name).write_bytes(original)


@pytest.fixture
def seen() -> list[str]:
    """The points that are reached, in order."""
    reached: list[str] = []
    for name in points.NAMES:
        points.on(name, lambda name=name: reached.append(name))
    yield reached
    points.clear()


def test_the_points_of_a_save_a_replacement_and_a_removal(
    tmp_path: Path, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a", nn.Linear(2, 2), trainer_state={})
    first = ["prepared", "share_opened", "share_written", "share_synced", "gathered", "manifest_written"]
    assert seen == [*first, "before_rename", "after_rename", "parent_synced"]
    seen.clear()
    save(tmp_path / "a", nn.Linear(2, 2), trainer_state={})
    assert seen == [*first, "before_rename", "after_rename", "parent_synced", "old_removed"]
    seen.clear()
    monkeypatch.setattr(commit, "_exchange", lambda a, b: False)
    save(tmp_path / "a", nn.Linear(2, 2), trainer_state={})
    assert seen[-5:] == ["before_rename", "renamed_aside", "after_rename", "parent_synced", "old_removed"]
    seen.clear()
    checkpoint.remove_checkpoint(tmp_path / "a")
    assert seen == ["remove_renamed"]


def test_an_unknown_point_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no point 'somewhere'"):
        points.on("somewhere", lambda: None)


@pytest.mark.parametrize("point", [p for p in points.NAMES if p != "snapshot_taken"])
@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_at_any_point_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, point: str, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(commit, "_exchange", lambda a, b: False)
    at_step(tmp_path / "a", 1)
    at_step(tmp_path / "b", 0, seed=9)
    if (pid := os.fork()) == 0:
        points.on(point, lambda: os.kill(os.getpid(), 9))
        at_step(tmp_path / "a", 2, seed=2)
        checkpoint.remove_checkpoint(tmp_path / "b")
        os._exit(0)
    reached = point != "renamed_aside" or not exchange
    assert os.waitpid(pid, 0)[1] == (9 if reached else 0)
    newest = checkpoint.list_checkpoints(tmp_path)[-1]
    committed = ("after_rename", "parent_synced", "old_removed", "remove_renamed")
    assert newest.step == (2 if point in committed or not reached else 1)
    checkpoint.verify_checkpoint(newest.path)
    other = Model(5)
    load(Path(newest.path), other)
    assert same(other, Model(2 if newest.step == 2 else 0))
    at_step(tmp_path / "a", 3)
    assert steps(tmp_path)[-1] == 3
