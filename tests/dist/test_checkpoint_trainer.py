"""The whole of it under the Trainer on two ranks: bar, event files, ModelCheckpoint, and a resumed run."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from neuron_lightning import (
    NeuronTensorBoardLogger,
    NeuronTQDMProgressBar,
    NeuronXLAStrategy,
    checkpoint,
    parallel_state,
)
from neuron_lightning.testing import RankPool
from tests.dist import strategy_cases as cases

EPOCHS = 6


def run(
    kind: type[LightningModule], folder: str, strategy: dict[str, Any], resume: str | None
) -> dict[str, Any]:
    """One fit; returns weights, what was printed, and the paths that ModelCheckpoint knows."""
    sys.stdout = printed = io.StringIO()
    module = cases.new(kind)
    keeper = ModelCheckpoint(
        f"{folder}/ckpt", save_top_k=2, monitor="step", mode="max", every_n_train_steps=2, save_last=True
    )
    options = {
        "logger": NeuronTensorBoardLogger(save_dir=folder, name="logs"),
        "callbacks": [keeper, NeuronTQDMProgressBar(line_seconds=0)],
        "enable_checkpointing": True,
        "enable_progress_bar": True,
        "log_every_n_steps": 1,
    }
    try:
        chosen = NeuronXLAStrategy(**strategy)
        trainer = make_trainer(chosen, options)
        loader = torch.utils.data.DataLoader(cases.dataset(), batch_size=8)
        trainer.fit(module, loader, ckpt_path=resume)
        return {
            "weights": cases.trained(module),
            "printed": printed.getvalue(),
            "last": keeper.last_model_path,
            "steps": trainer.global_step,
        }
    finally:
        sys.stdout = sys.__stdout__
        parallel_state.destroy_model_parallel()


def make_trainer(strategy: Any, options: dict[str, Any]) -> Any:
    return cases.Trainer(
        strategy=strategy, precision="64-true", max_epochs=EPOCHS, max_steps=-1, **{**cases.QUIET, **options}
    )


@pytest.mark.parametrize("kind", [cases.Mlp, cases.ManualMlp])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    pool2: RankPool, tmp_path: Path, kind: type[LightningModule]
) -> None:
    strategy = {"zero1": True}
    whole = pool2.run(run, kind, str(tmp_path / "whole"), strategy, None)
    saved = sorted((tmp_path / "whole" / "ckpt").iterdir())
    assert len(saved) == 3
    assert all(checkpoint.is_checkpoint(path) for path in saved)
    middle = next(path for path in saved if path.name != "last.ckpt")
    step = checkpoint.read_trainer_state(middle)["global_step"]
    assert 0 < step < whole[0]["steps"]
    resumed = pool2.run(run, kind, str(tmp_path / "resumed"), strategy, str(middle))
    assert resumed[0]["steps"] == whole[0]["steps"]
    for a, b in zip(whole, resumed, strict=True):
        assert all(torch.equal(a["weights"][n], b["weights"][n]) for n in a["weights"])


def test_one_rank_prints_and_writes_events(pool2: RankPool, tmp_path: Path) -> None:
    first, second = pool2.run(run, cases.Mlp, str(tmp_path), {"zero1": True}, None)
    assert second["printed"] == ""
    lines = first["printed"].splitlines()
    assert "loss=" in lines[-1]
    assert "lr=" in lines[-1]
    assert "grad_norm=" in lines[-1]
    assert "samples/s=" in lines[-1]
    files = list(tmp_path.glob("logs/**/events*"))
    assert len(files) == 1
    events = EventAccumulator(str(files[0]))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(1, first["steps"] + 1))
