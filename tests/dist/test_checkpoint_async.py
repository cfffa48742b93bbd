"""Saving in the background over ranks: beside the collectives of training, with one outcome for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neuron_lightning import checkpoint
from neuron_lightning.testing import RankFailure, RankPool
from tests.dist import async_cases, checkpoint_cases


@pytest.mark.parametrize(
    ("tp", "zero1", "kind"), [(2, True, "deduped"), (4, False, "sharded"), (1, True, "deduped")]
)
def test_a_save_beside_training_holds_the_state_of_its_step(
    pool4: RankPool, tmp_path: Path, tp: int, zero1: bool, kind: str
) -> None:
    path = str(tmp_path / "a")
    assert all(pool4.run(async_cases.save_while_training, path, tp, zero1, kind))
    for other_tp, other_zero1 in ((1, True), (2, False), (4, True)):
        assert pool4.run(checkpoint_cases.load_as, path, other_tp, other_zero1, torch.float32) == [[]] * 4
    assert [checkpoint.read_rank_state(path, r) for r in range(4)] == [{"rank": r} for r in range(4)]


@pytest.mark.parametrize(("failing", "budget"), [(0, None), (1, None), (1, 0)])
def test_an_error_on_one_rank_is_the_same_error_on_all(
    pool2: RankPool, tmp_path: Path, failing: int, budget: int | None
) -> None:
    outcomes = pool2.run(async_cases.fail_on_one_rank, str(tmp_path / "a"), failing, budget)
    assert len({message for message, _, _ in outcomes}) == 1
    assert f"rank {failing} could not save" in outcomes[0][0]
    assert "No space left on device" in outcomes[0][0]
    assert all(worked and left == [] for _, worked, left in outcomes)


def test_fifty_saves_leave_no_file_and_no_thread_open(pool2: RankPool, tmp_path: Path) -> None:
    assert pool2.run(async_cases.fifty_saves, str(tmp_path / "a")) == [[], []]
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    checkpoint.verify_checkpoint(tmp_path / "a")


def test_a_rank_that_dies_while_it_writes_is_an_error_on_the_others(tmp_path: Path) -> None:
    with RankPool(2) as pool, pytest.raises(RankFailure, match="exit code 9"):
        pool.run(async_cases.die_in_the_background, str(tmp_path / "a"), 1)
    (heard,) = tmp_path.glob("*.heard-*")
    seconds, _, message = heard.read_text().partition(" ")
    assert heard.name == "a.heard-0"
    assert float(seconds) < 10
    assert "the ranks have lost each other" in message
    assert not checkpoint.is_checkpoint(tmp_path / "a")
