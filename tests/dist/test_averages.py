"""Averaged weights under sharding: stored beside the module's, and back at another layout."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import nn

from neuron_lightning import NeuronModelCheckpoint, checkpoint, parallel_state
from tests.dist import strategy_cases as cases
from tests.dist.test_model_checkpoint import run

TP = {"tensor_parallel_size": 2, "tp_plan": {"up": "column", "down": "row"}, "zero1": True}
DP = {"zero1": True}


class Plain(cases.Mlp):
    """All parameters train, and a buffer counts."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("count", torch.zeros(1))

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


MAKE = {
    "ema": lambda: EMAWeightAveraging(decay=0.8),
    "average": lambda: WeightAveraging(),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
}


def average_of(trainer):
    """The averaged weights of this rank, by name."""
    model = next(c for c in trainer.callbacks if hasattr(c, "_average_model"))._average_model
    return {
        n.removeprefix("module."): t.clone() for n, t in model.state_dict().items() if "n_averaged" not in n
    }


def rank_averages(folder, kind, first, second, epochs, at):
    """A whole run; then one from its checkpoint, perhaps on another layout."""
    try:
        arguments = {"every_n_train_steps": at, "save_top_k": -1, "filename": "{step}"}
        options = {"max_epochs": epochs}
        whole, module, _ = run(
            Plain,
            first,
            NeuronModelCheckpoint(f"{folder}/a", **arguments),
            callbacks=[MAKE[kind]()],
            **options,
        )
        average, weights = average_of(whole), cases.trained(module)
        again, resumed, _ = run(
            Plain, second, NeuronModelCheckpoint(f"{folder}/b", **arguments), callbacks=[MAKE[kind]()],
            ckpt_path=f"{folder}/a/step={at}.ckpt", **options,
        )  # fmt: skip
        found = average_of(again), cases.trained(resumed)
        last = f"step={epochs * 8 - epochs * 8 % at}.ckpt"
        full = [checkpoint.read_full_state(f"{folder}/{run_}/{last}") for run_ in "ab"]
        return (average, weights), found, full
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("kind", list(MAKE))
@pytest.mark.parametrize("strategy", [DP, TP], ids=["dp", "tp"])
@pytest.mark.parametrize("at", [5, 12])
def test_a_resumed_run_has_the_averages_of_the_uninterrupted_one(pool2, tmp_path, kind, strategy, at):
    for before, after, _ in pool2.run(rank_averages, str(tmp_path), kind, strategy, strategy, 3, at):
        for expected, found in zip(before, after, strict=True):
            for name in expected:
                assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("kind", list(MAKE))
@pytest.mark.parametrize(("first", "second"), [(TP, DP), (DP, TP)], ids=["tp-dp", "dp-tp"])
def test_they_come_back_at_another_layout(pool2, tmp_path, kind, first, second):
    _, _, (one, other) = pool2.run(rank_averages, str(tmp_path), kind, first, second, 3, 12)[0]
    assert set(one) == {"up.weight", "up.bias", "down.weight", "down.bias", "unused", "count"}
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=2e-5, atol=1e-6)


def rank_exports(folder):
    """The checkpoint's weights are the averaged ones, as Lightning's own would be."""
    try:
        saving = NeuronModelCheckpoint(folder, every_n_train_steps=6, filename="{step}")
        keep = {}
        callback = EMAWeightAveraging(decay=0.5)
        original = callback.on_save_checkpoint

        def note(trainer, module, state):
            original(trainer, module, state)
            keep.update({n: t.clone() for n, t in state["state_dict"].items()})

        callback.on_save_checkpoint = note
        run(Plain, {}, saving, callbacks=[callback], max_steps=6)
        full = checkpoint.read_full_state(f"{folder}/step=6.ckpt")
        assert set(full) == set(keep)
        return all(torch.equal(full[n], keep[n].cpu()) for n in keep)
    finally:
        parallel_state.destroy_model_parallel()


def test_the_checkpoint_holds_the_averaged_weights(pool2, tmp_path):
    assert pool2.run(rank_exports, str(tmp_path)) == [True, True]
