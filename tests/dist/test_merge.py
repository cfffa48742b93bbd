"""A checkpoint merged into one Lightning file: stock Lightning and our strategy go on from it as from the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from neuron_lightning import NeuronXLAStrategy, parallel_state
from neuron_lightning.errors import CheckpointError
from neuron_lightning.testing import RankPool
from tests.dist import strategy_cases as cases

PLAN = {"tensor_parallel_size": 2, "tp_plan": {"up": "column", "down": "row"}}
LAYOUTS = [PLAN, {"zero1": True}, {"zero1": False}]
SAVED, EPOCHS = 4, 10
WHOLE: dict = {"accumulate_grad_batches": 2}  # every step sees the whole data set: its order does not matter


def rank_saves(folder: str, strategy: dict) -> None:
    """Trains, saves, and merges on rank 0."""
    module = cases.new(cases.Mlp)
    try:
        chosen = NeuronXLAStrategy(**strategy)
        trainer = cases.fit(module, chosen, replicas=2 // chosen.settings.tp, epochs=SAVED, **WHOLE)
        trainer.save_checkpoint(f"{folder}/saved")
        if dist.get_rank() == 0:
            NeuronXLAStrategy.merge_checkpoint([f"{folder}/saved"], f"{folder}/merged.ckpt")
        dist.barrier()
    finally:
        parallel_state.destroy_model_parallel()


def rank_resumes(path: str, strategy: dict) -> dict:
    """Goes on from a checkpoint and returns the whole weights that rank 0 holds in the end."""
    module = cases.new(cases.Mlp)
    try:
        chosen = NeuronXLAStrategy(**strategy)
        trainer = Trainer(
            strategy=chosen, precision="64-true", max_epochs=EPOCHS, logger=False, **WHOLE, **cases.QUIET
        )
        replicas = 2 // chosen.settings.tp
        loader = torch.utils.data.DataLoader(cases.dataset(), batch_size=cases.SAMPLES // replicas // 2)
        trainer.fit(module, loader, ckpt_path=path)
        assert trainer.global_step == EPOCHS
        return cases.trained(module)
    finally:
        parallel_state.destroy_model_parallel()


def stock(folder: Path, path: Path | None = None) -> dict:
    """Stock Lightning on one rank: from a checkpoint, or from its own of the same epoch; the weights in the end."""
    if path is None:
        path = folder / "stock.ckpt"
        cases.fit(cases.new(cases.Mlp), "auto", epochs=SAVED, devices=1, **WHOLE).save_checkpoint(path)
    module = cases.new(cases.Mlp)
    options = {"precision": "64-true", "logger": False, "devices": 1, **WHOLE, **cases.QUIET}
    trainer = Trainer(max_epochs=EPOCHS, **options)
    loader = torch.utils.data.DataLoader(cases.dataset(), batch_size=cases.SAMPLES // 2)
    trainer.fit(module, loader, ckpt_path=path, weights_only=True)
    assert trainer.global_step == EPOCHS
    return cases.trained(module)


@pytest.mark.parametrize("strategy", LAYOUTS)
def test_stock_lightning_goes_on_from_a_merged_checkpoint(
    pool2: RankPool, tmp_path: Path, strategy: dict
) -> None:
    pool2.run(rank_saves, str(tmp_path), strategy)
    document = torch.load(tmp_path / "merged.ckpt", weights_only=True)
    assert document["state_dict"]["up.weight"].shape == (16, 8)
    assert document["global_step"] == SAVED
    ours, expected = stock(tmp_path, tmp_path / "merged.ckpt"), stock(tmp_path)
    assert cases.worst(ours, expected) < 1e-11


@pytest.mark.parametrize("target", LAYOUTS)
def test_our_strategy_goes_on_from_a_merged_checkpoint_at_any_layout(
    pool2: RankPool, tmp_path: Path, target: dict
) -> None:
    pool2.run(rank_saves, str(tmp_path), PLAN)
    from_folder = pool2.run(rank_resumes, str(tmp_path / "saved"), target)[0]
    from_file = pool2.run(rank_resumes, str(tmp_path / "merged.ckpt"), target)[0]
    assert all(torch.equal(from_file[name], from_folder[name]) for name in from_folder)


def test_a_file_of_stock_lightning_is_resumed_from(pool2: RankPool, tmp_path: Path) -> None:
    stock(tmp_path)
    expected = cases.reference(cases.Mlp, epochs=EPOCHS, **WHOLE)
    ours = pool2.run(rank_resumes, str(tmp_path / "stock.ckpt"), {"zero1": True})[0]
    assert cases.worst(ours, expected) < 1e-11


def test_bad_input(pool2: RankPool, tmp_path: Path) -> None:
    pool2.run(rank_saves, str(tmp_path), {"zero1": True})
    merge = NeuronXLAStrategy.merge_checkpoint
    with pytest.raises(CheckpointError, match="exists: choose another name"):
        merge([tmp_path / "saved"], tmp_path / "merged.ckpt")
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    merge(files, tmp_path / "again.ckpt")
    states = [
        torch.load(tmp_path / n, weights_only=True)["state_dict"] for n in ("again.ckpt", "merged.ckpt")
    ]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    with pytest.raises(CheckpointError, match="must be of one checkpoint, but they are of none"):
        merge([], tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        merge([tmp_path / "nothing"], tmp_path / "x.ckpt")
