"""Modules from checkpoints, outside a Trainer: whole, in part, and from every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

import neuron_lightning
from neuron_lightning import NeuronLTModule, checkpoint
from neuron_lightning.checkpoint.formats import convert as formats
from neuron_lightning.checkpoint.formats import lightning_file, neuron
from neuron_lightning.cli.main import main
from neuron_lightning.errors import CheckpointError
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM
from tests.unit import formats_cases as cases


class Plain(LightningModule):
    """A module that keeps its hyper-parameters."""

    def __init__(self, width: int, act: type[nn.Module] = nn.ReLU, scale: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, width)
        self.act = act()
        self.scale = scale


class Late(LightningModule):
    """Builds its model where a strategy would ask for it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.width = width
        self.layer: Any = None

    def configure_model(self) -> None:
        if self.layer is None:
            self.layer = nn.Linear(self.width, self.width)


class GuideModule(NeuronLTModule):
    """As in the guide: a Llama from its arguments."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__({}, torch.optim.AdamW, None, model_fn=LlamaForCausalLM, model_args=(config,))
        self.save_hyperparameters()


def save(module: nn.Module, path: Path, hyper_parameters: dict[str, Any]) -> None:
    checkpoint.write_checkpoint(
        path,
        module_state=module.state_dict(),
        parameters=dict(module.named_parameters()),
        trainer_state={"hyper_parameters": hyper_parameters, "global_step": 1},
    )


def equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(x == y and torch.equal(s, t) for (x, s), (y, t) in pairs)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_module_from_its_hyper_parameters(tmp_path: Path, kind: str) -> None:
    module = Plain(4, scale=0.5)
    save(module, tmp_path / "a", {"width": 4, "scale": 0.5})
    path = tmp_path / "a"
    if kind == "file":
        path = tmp_path / "a.ckpt"
        lightning_file.write(path, neuron.read(tmp_path / "a"))
        assert equal(Plain.load_from_checkpoint(path, weights_only=True), module), (
            "stock Lightning reads it too"
        )
    loaded = neuron_lightning.load_from_checkpoint(Plain, path)
    assert equal(loaded, module)
    assert loaded.scale == 0.5
    assert neuron_lightning.load_from_checkpoint(Plain, path, scale=3.0).scale == 3.0


def test_configure_model_runs_first(tmp_path: Path) -> None:
    module = Late(4)
    module.configure_model()
    save(module, tmp_path / "a", {"width": 4})
    assert equal(neuron_lightning.load_from_checkpoint(Late, tmp_path / "a"), module)


def test_a_guide_module_from_a_folder(tmp_path: Path) -> None:
    module = GuideModule(dict(cases.SHAPE))
    module.setup()
    save(module, tmp_path / "a", {"config": dict(cases.SHAPE)})
    loaded = GuideModule.load_from_checkpoint(tmp_path / "a")
    assert equal(loaded, module)
    ids = torch.arange(16)[None]
    assert torch.equal(loaded.model(ids).logits, module.model(ids).logits)


def test_classes_are_never_imported_from_a_checkpoint(tmp_path: Path) -> None:
    module = Plain(4, act=nn.Tanh)
    save(module, tmp_path / "a", {"width": 4, "act": nn.Tanh})
    with pytest.raises(
        CheckpointError, match=r"only the name torch\.nn\.modules\.activation\.Tanh of the argument 'act'"
    ):
        neuron_lightning.load_from_checkpoint(Plain, tmp_path / "a")
    assert equal(neuron_lightning.load_from_checkpoint(Plain, tmp_path / "a", act=nn.Tanh), module)


def test_a_missing_argument_is_named(tmp_path: Path) -> None:
    save(Plain(4), tmp_path / "a", {})
    with pytest.raises(CheckpointError, match=r"Plain needs width, which .* does not hold: pass width="):
        neuron_lightning.load_from_checkpoint(Plain, tmp_path / "a")


def test_weights_in_part_with_renamed_layers(tmp_path: Path) -> None:
    save(Plain(4), tmp_path / "a", {})
    module = nn.ModuleDict({"backbone": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    before = module["head"].weight.clone()
    with pytest.raises(CheckpointError, match=r"4 missing in the checkpoint: backbone\.weight"):
        neuron_lightning.load_weights(module, tmp_path / "a")
    report = neuron_lightning.load_weights(
        module, tmp_path / "a", strict=False, rename={r"^layer\.weight": "backbone.weight"}
    )
    assert report.loaded == ("backbone.weight",)
    assert report.missing == ("backbone.bias", "head.weight", "head.bias")
    assert report.unexpected == ("layer.bias",)
    assert "1 tensors were loaded; 3 not in the checkpoint: backbone.bias" in str(report)
    assert torch.equal(module["backbone"].weight, checkpoint.read_full_state(tmp_path / "a")["layer.weight"])
    assert torch.equal(module["head"].weight, before)


def test_another_shape_is_an_error_even_so(tmp_path: Path) -> None:
    save(Plain(4), tmp_path / "a", {})
    with pytest.raises(CheckpointError, match=r"layer\.weight is \(4, 4\) in the checkpoint and \(5, 5\)"):
        neuron_lightning.load_weights(Plain(5), tmp_path / "a", strict=False)


@pytest.mark.parametrize("kind", sorted(formats.FORMATS))
def test_weights_of_every_format(tmp_path: Path, kind: str) -> None:
    config = LlamaConfig(**cases.SHAPE)
    trained = cases.Trained(config, steps=0)
    trained.save(tmp_path / "ours")
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()), encoding="utf-8")
    arguments = [
        "convert",
        tmp_path / "ours",
        tmp_path / "x",
        "--to",
        kind,
        "--tp",
        4,
        "--config",
        tmp_path / "config.json",
    ]
    assert main([str(argument) for argument in arguments]) == 0
    module = nn.Module()
    module.model = LlamaForCausalLM(config)
    report = neuron_lightning.load_weights(module, tmp_path / "x")
    assert len(report.loaded) == 21
    assert equal(module.model, trained.model)
