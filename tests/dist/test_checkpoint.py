"""Checkpoints over ranks: any layout loads any other exactly, failures are the same on all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint import manifest
from neuron_lightning.testing import RankPool
from tests.dist import checkpoint_cases as cases

LAYOUTS = [(tp, zero1) for tp in (1, 2, 4) for zero1 in (False, True)]


@pytest.mark.parametrize(("tp", "zero1"), LAYOUTS)
def test_every_layout_of_four_ranks_loads_into_every_other(
    pool4: RankPool, tmp_path: Path, tp: int, zero1: bool
) -> None:
    path = str(tmp_path / "a")
    pool4.run(cases.save_as, path, tp, zero1, torch.float32)
    for other_tp, other_zero1 in LAYOUTS:
        assert pool4.run(cases.load_as, path, other_tp, other_zero1, torch.float32) == [[]] * 4


def test_low_precision_with_master_weights(pool4: RankPool, tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    pool4.run(cases.save_as, path, 2, True, torch.bfloat16)
    stored = manifest.read(Path(path))
    assert stored.tensors["model/row.weight"].dtype == torch.bfloat16
    assert stored.tensors["optimizer.0/row.weight/master"].dtype == torch.float32
    for tp, zero1 in ((2, True), (1, True), (4, False)):
        assert pool4.run(cases.load_as, path, tp, zero1, torch.bfloat16) == [[]] * 4


def test_world_sizes_change_up_and_down(pool2: RankPool, pool4: RankPool, tmp_path: Path) -> None:
    four, two, one = (str(tmp_path / name) for name in ("four", "two", "one"))
    pool4.run(cases.save_as, four, 2, True, torch.float32)
    pool2.run(cases.save_as, two, 1, True, torch.float32)
    cases.save_as(one, 1, False, torch.float32)
    for path in (four, two, one):
        assert pool4.run(cases.load_as, path, 4, True, torch.float32) == [[]] * 4
        assert pool2.run(cases.load_as, path, 2, True, torch.float32) == [[]] * 2
        assert cases.load_as(path, 1, True, torch.float32) == []


def test_nothing_is_stored_twice_and_names_are_canonical(pool4: RankPool, tmp_path: Path) -> None:
    sizes = []
    for tp, zero1 in LAYOUTS:
        path = tmp_path / f"{tp}-{zero1}"
        pool4.run(cases.save_as, str(path), tp, zero1, torch.float32)
        stored = manifest.read(path)
        sizes.append(sum(b.box.numel for t in stored.tensors.values() for b in t.boxes))
        weights = {name.removeprefix("model/") for name in stored.tensors if name.startswith("model/")}
        assert weights == {*cases.GLOBAL_SHAPES, "count"}
        assert {n: stored.tensors[f"model/{n}"].shape for n in cases.GLOBAL_SHAPES} == cases.GLOBAL_SHAPES
    unique = sum(torch.Size(s).numel() for s in cases.GLOBAL_SHAPES.values())
    assert sizes == [3 * unique + 1] * len(LAYOUTS)


def test_the_sharded_form_holds_all_that_ranks_hold_and_loads_anywhere(
    pool4: RankPool, tmp_path: Path
) -> None:
    path = str(tmp_path / "a")
    deduped = str(tmp_path / "b")
    size = pool4.run(cases.save_as, path, 4, False, torch.float32, "sharded")[0]
    assert size > pool4.run(cases.save_as, deduped, 4, False, torch.float32)[0]
    assert manifest.read(Path(path)).state_dict_type == "sharded"
    for tp, zero1 in ((1, True), (2, False), (4, True)):
        assert pool4.run(cases.load_as, path, tp, zero1, torch.float32) == [[]] * 4


def test_large_boxes_are_cut_among_the_ranks_that_hold_them(pool4: RankPool, tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    pool4.run(cases.save_in_small_pieces, path, 1, False)
    stored = manifest.read(Path(path)).tensors["model/embed.weight"]
    assert len({box.file for box in stored.boxes}) == 4
    assert sum(box.box.numel for box in stored.boxes) == 40
    for tp, zero1 in ((1, False), (2, True), (4, True)):
        assert pool4.run(cases.load_as, path, tp, zero1, torch.float32) == [[]] * 4


def test_full_state_is_the_global_model(pool4: RankPool, tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    pool4.run(cases.save_as, path, 4, True, torch.float32)
    one = str(tmp_path / "one")
    cases.save_as(one, 1, False, torch.float32)
    a, b = checkpoint.read_full_state(path), checkpoint.read_full_state(one)
    assert sorted(a) == sorted(b)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_every_rank_gets_its_own_state_back(pool4: RankPool, tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    pool4.run(cases.save_as, path, 2, True, torch.float32)
    assert [checkpoint.read_rank_state(path, r) for r in range(5)] == [{"rank": r} for r in range(4)] + [None]


@pytest.mark.parametrize("failing", [0, 3])
def test_an_error_on_one_rank_is_the_same_error_on_all(pool4: RankPool, tmp_path: Path, failing: int) -> None:
    outcomes = pool4.run(cases.save_with_failure, str(tmp_path / "a"), failing)
    messages = {message for message, _ in outcomes}
    assert len(messages) == 1
    message = messages.pop()
    assert f"rank {failing} could not save the checkpoint" in message
    assert "No space left on device" in message
    assert all(left == [] for _, left in outcomes)
    assert checkpoint.is_checkpoint(tmp_path / "a")


def test_damage_is_the_same_error_on_all_ranks(pool4: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "a"
    pool4.run(cases.save_as, str(path), 2, True, torch.float32)
    victim = path / "rank-00002.model.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    messages = pool4.run(cases.load_after_damage, str(path))
    assert len(set(messages)) == 1
    assert "rank-00002.model.safetensors does not match its hash" in messages[0]


def test_ranks_that_save_to_different_places_are_told(pool2: RankPool, tmp_path: Path) -> None:
    messages = pool2.run(cases.save_to_different_paths, str(tmp_path))
    assert all("the ranks do not save the same checkpoint" in m and "rank 1" in m for m in messages)
    assert list(tmp_path.iterdir()) == []
