"""Saving in the background, one process: what is saved is what was there, errors surface, nothing is left behind."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint import AsyncSaver, points
from neuron_lightning.errors import CheckpointError
from tests.leaks import held
from tests.unit.test_checkpoint_folder import Model, load, same, trained


@pytest.fixture
def saver() -> Iterator[AsyncSaver]:
    with AsyncSaver() as made:
        yield made
    points.clear()


class Gate:
    """Holds the background thread at a point of the save."""

    def __init__(self, point: str) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        points.on(point, self._pass)

    def _pass(self) -> None:
        self.reached.set()
        assert self.open.wait(60)


def state(model: nn.Module, **kwargs: Any) -> dict[str, Any]:
    return {
        "module_state": model.state_dict(),
        "parameters": dict(model.named_parameters()),
        "trainer_state": {"global_step": 3},
        **kwargs,
    }


def scramble(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7)


def test_what_changes_after_the_snapshot_is_not_saved(saver: AsyncSaver, tmp_path: Path) -> None:
    gate = Gate("prepared")
    model, notes = Model(1), {"global_step": 3, "list": [1], "tensor": torch.zeros(3)}
    saver.save(tmp_path / "a", **state(model, trainer_state=notes, rank_state=notes))
    assert gate.reached.wait(60)
    scramble(model)
    notes["list"].append(2)
    notes["tensor"] += 1
    assert saver.pending == str(tmp_path / "a")
    assert not checkpoint.is_checkpoint(tmp_path / "a")
    gate.open.set()
    saver.wait()
    assert saver.pending is None
    other = Model(2)
    load(tmp_path / "a", other)
    assert same(other, Model(1))
    for read in (
        checkpoint.read_trainer_state(tmp_path / "a"),
        checkpoint.read_rank_state(tmp_path / "a", 0),
    ):
        assert read is not None
        assert read["list"] == [1]
        assert torch.equal(read["tensor"], torch.zeros(3))


def test_optimizer_state_and_its_scalars_are_those_of_the_snapshot(saver: AsyncSaver, tmp_path: Path) -> None:
    model, optimizer = trained(0, lambda p: torch.optim.AdamW(p, lr=0.1), 3)
    gate = Gate("prepared")
    saver.save(tmp_path / "a", **state(model, optimizers=[optimizer]))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 9.0
    gate.open.set()
    saver.wait()
    expected_model, expected = trained(0, lambda p: torch.optim.AdamW(p, lr=0.1), 3)
    fresh, resumed = trained(1, lambda p: torch.optim.AdamW(p, lr=0.1), 0)
    load(tmp_path / "a", fresh)
    checkpoint.load_optimizer_state(tmp_path / "a", [resumed], dict(fresh.named_parameters()))
    assert same(fresh, expected_model)
    assert resumed.param_groups[0]["lr"] == 0.1
    for got, want in zip(resumed.export_state(), expected.export_state(), strict=True):
        assert got.scalars == want.scalars
        assert all(torch.equal(got.tensors[k], want.tensors[k]) for k in want.tensors)


def test_a_second_save_waits_for_the_first_and_uses_its_memory(saver: AsyncSaver, tmp_path: Path) -> None:
    gate = Gate("before_rename")
    model = Model(1)
    saver.save(tmp_path / "a", **state(model))
    buffers = {name: b.data_ptr() for name, b in saver._snapshot._buffers.items()}
    threading.Timer(0.3, gate.open.set).start()
    scramble(model)
    saver.save(tmp_path / "b", **state(model))
    assert checkpoint.is_checkpoint(tmp_path / "a")
    saver.wait()
    assert {name: b.data_ptr() for name, b in saver._snapshot._buffers.items()} == buffers
    other = Model(2)
    load(tmp_path / "a", other)
    assert same(other, Model(1))
    load(tmp_path / "b", other)
    assert same(other, model)


def test_another_model_gets_another_plan(saver: AsyncSaver, tmp_path: Path) -> None:
    for name, size in (("a", 3), ("b", 5), ("c", 3)):
        model = nn.Linear(size, size)
        saver.save(tmp_path / name, **state(model))
        saver.wait()
        assert torch.equal(checkpoint.read_full_state(tmp_path / name)["weight"], model.weight)


def test_an_error_is_raised_once_where_it_is_waited_for(saver: AsyncSaver, tmp_path: Path) -> None:
    def full_disk() -> None:
        raise OSError(28, "No space left on device")

    points.on("share_opened", full_disk)
    saver.save(tmp_path / "a", **state(Model()))
    while saver.pending is not None:
        time.sleep(0.01)
    assert saver.failed
    with pytest.raises(CheckpointError, match="No space left on device"):
        saver.save(tmp_path / "b", **state(Model()))
    assert not saver.failed
    points.clear()
    saver.save(tmp_path / "b", **state(Model()))
    saver.wait()
    assert [f.name for f in tmp_path.iterdir()] == ["b"]


def test_state_that_cannot_be_stored_is_named_at_once(saver: AsyncSaver, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"callbacks\.Mine"):
        saver.save(tmp_path / "a", **state(Model(), trainer_state={"callbacks": {"Mine": nn.Linear(1, 1)}}))
    assert not saver.failed
    assert list(tmp_path.iterdir()) == []


def test_the_commit_is_announced_and_an_error_in_that_says_so(saver: AsyncSaver, tmp_path: Path) -> None:
    seen = []

    def note() -> None:
        seen.append((checkpoint.is_checkpoint(tmp_path / "a"), threading.current_thread().name))

    saver.save(tmp_path / "a", on_commit=note, **state(Model()))
    saver.wait()
    assert seen == [(True, "checkpoint-save")]

    def fail() -> None:
        raise AttributeError("a mistake")

    saver.save(tmp_path / "b", on_commit=fail, **state(Model()))
    with pytest.raises(CheckpointError, match=r"follows the commit of .* \(it is committed\).*a mistake"):
        saver.wait()
    assert checkpoint.is_checkpoint(tmp_path / "b")


def test_over_the_budget_it_is_written_while_training_waits(tmp_path: Path) -> None:
    with AsyncSaver(memory_budget=100) as saver:
        with pytest.warns(UserWarning, match=r"takes [\d,]+ bytes on rank 0, memory_budget is 100"):
            saver.save(tmp_path / "a", **state(Model(1)))
        assert checkpoint.is_checkpoint(tmp_path / "a")
        assert saver._snapshot._buffers == {}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            saver.save(tmp_path / "b", **state(Model(1)))
        points.on("share_opened", lambda: os.stat(tmp_path / "not there"))
        saver.save(tmp_path / "c", **state(Model(1)))
        assert saver.failed
        with pytest.raises(CheckpointError, match="FileNotFoundError"):
            saver.wait()
        points.clear()
    other = Model(2)
    load(tmp_path / "b", other)
    assert same(other, Model(1))


def test_a_closed_saver_and_a_negative_budget_are_refused(tmp_path: Path) -> None:
    saver = AsyncSaver()
    saver.close()
    saver.close()
    with pytest.raises(CheckpointError, match="this saver is closed"):
        saver.save(tmp_path / "a", **state(Model()))
    with pytest.raises(CheckpointError, match="at least 0 bytes, or None, not -1"):
        AsyncSaver(memory_budget=-1)


def resident() -> int:
    ctypes.CDLL(None).malloc_trim(0)  # the cpu backend keeps freed memory with the process
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_fifty_saves_leave_nothing_but_the_last(saver: AsyncSaver, tmp_path: Path) -> None:
    model = nn.Linear(512, 512)
    figures = []
    for step in range(50):
        saver.save(tmp_path / "a", **state(model))
        if step in (9, 49):
            saver.wait()
            figures.append((held(), resident()))
    (early, memory), (late, memory_later) = figures
    assert late <= early
    assert memory_later - memory < 4 << 20
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


EXIT = """
import sys, torch
from torch import nn
from neuron_lightning.checkpoint import AsyncSaver, points
model = nn.Linear(2000, 2000)
if sys.argv[2] == "slow":
    import time
    points.on("prepared", lambda: time.sleep(1))
saver = AsyncSaver()
saver.save(sys.argv[1], module_state=model.state_dict(), parameters=dict(model.named_parameters()), trainer_state={})
"""


@pytest.mark.parametrize("pace", ["slow", "fast"])
def test_a_save_in_flight_at_the_interpreters_end_is_finished(tmp_path: Path, pace: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXIT, str(tmp_path / "a"), pace], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    checkpoint.verify_checkpoint(tmp_path / "a")
