"""Lightning's plugin: what it reads, removes and refuses; and the bar over long transfers."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from neuron_lightning.errors import CheckpointError
from neuron_lightning.lightning import checkpoint_io
from neuron_lightning.lightning.checkpoint_io import NeuronCheckpointIO, show_transfer
from tests.unit.test_checkpoint_folder import Model, save
from tests.unit.test_progress import Module, data


def test_a_folder_is_read_with_whole_tensors_and_removed(tmp_path: Path) -> None:
    save(tmp_path / "a", Model(), trainer_state={"global_step": 3, "epoch": 1})
    plugin = NeuronCheckpointIO(save_load_xser=True, weights_only=False)
    loaded = plugin.load_checkpoint(tmp_path / "a")
    assert loaded["global_step"] == 3
    assert torch.equal(loaded["state_dict"]["head.weight"], Model().head.weight)
    plugin.remove_checkpoint(tmp_path / "a")
    plugin.remove_checkpoint(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_dictionary_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="written by NeuronXLAStrategy on all ranks together"):
        NeuronCheckpointIO().save_checkpoint({"state_dict": {}}, tmp_path / "a.ckpt")


def test_under_another_strategy_the_first_save_says_so(tmp_path: Path) -> None:
    run = Trainer(
        accelerator="cpu", devices=1, plugins=[NeuronCheckpointIO()], logger=False, max_steps=1, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="leave NeuronCheckpointIO out"):
        run.fit(Module(), data())


class Payload:
    """Not a tensor: torch's weights-only unpickler refuses it."""


def test_a_plain_file_is_read_without_running_code(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "plain.ckpt")
    torch.save({"payload": Payload()}, tmp_path / "code.ckpt")
    plugin = NeuronCheckpointIO()
    assert torch.equal(plugin.load_checkpoint(tmp_path / "plain.ckpt")["state_dict"]["w"], torch.ones(2))
    with pytest.raises(Exception, match="Weights only load failed"):
        plugin.load_checkpoint(tmp_path / "code.ckpt")
    trusted = plugin.load_checkpoint(tmp_path / "code.ckpt", weights_only=False)
    assert isinstance(trusted["payload"], Payload)


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Lets the clock run ``seconds`` from one look at it to the next."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(checkpoint_io.time, "monotonic", monotonic)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO)
    return caplog


def transfer() -> None:
    with show_transfer("Saving", "/x") as progress:
        progress("prepare", 0, 0)
        for done in range(0, 100, 10):
            progress("write", done * 10**6, 10**8)


def test_quick_transfers_are_silent(log: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 0.01)
    transfer()
    assert log.messages == []


def test_long_ones_say_how_far_they_are_in_a_file(log: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 4.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    transfer()
    assert any("Saving /x: write" in m and "% of 100 MB" in m for m in log.messages)
    assert 2 <= len(log.messages) <= 6
    assert "Saving /x took" in log.messages[-1]


def test_long_ones_show_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 4.0)
    screen = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})()
    monkeypatch.setattr(sys, "stderr", screen)
    transfer()
    assert "Saving /x (write)" in screen.getvalue()
    assert "90.0M/100M" in screen.getvalue()
