"""The strategy's arguments against nxd_config, and what this release refuses."""

from __future__ import annotations

import lightning
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from neuron_lightning import NeuronXLAPrecisionPlugin, NeuronXLAStrategy, neuronx_distributed_config
from neuron_lightning.errors import ConfigError, LaunchError

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def test_arguments_alone():
    settings = NeuronXLAStrategy(tensor_parallel_size=2, zero1=True, sequence_parallel=True).settings
    assert (settings.tp, settings.zero1, settings.sequence_parallel) == (2, True, True)
    assert settings.master_weights
    assert settings.fp32_grad_accumulation
    assert settings.max_grad_norm is None


def test_config_alone():
    config = neuronx_distributed_config(
        tensor_parallel_size=4, optimizer_config={"zero_one_enabled": True, "max_grad_norm": 0.5}
    )
    settings = NeuronXLAStrategy(nxd_config=config).settings
    assert (settings.tp, settings.zero1, settings.max_grad_norm) == (4, True, 0.5)


def test_the_same_in_both_places():
    config = neuronx_distributed_config(tensor_parallel_size=4)
    assert NeuronXLAStrategy(config, tensor_parallel_size=4, zero1=False).settings.tp == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensor_parallel_size": 2}, r"tensor_parallel_size=2, but nxd_config says 4"),
        ({"zero1": True}, r"zero1=True, but nxd_config says False"),
        ({"sequence_parallel": False}, r"sequence_parallel=False, but nxd_config says True"),
    ],
)
def test_contradictions(arguments, message):
    config = neuronx_distributed_config(tensor_parallel_size=4, sequence_parallel=True)
    with pytest.raises(ConfigError, match=message):
        NeuronXLAStrategy(config, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"pipeline_parallel_size": 2},
        {"expert_parallel_size": 2},
        {"context_parallel_size": 2},
        {"compile": True},
        {"layout": "auto"},
        {"state_dict_type": "full"},
    ],
    ids=str,
)
def test_what_this_release_lacks_is_refused(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        NeuronXLAStrategy(**arguments)


def test_registered_names():
    assert "neuron" in StrategyRegistry
    assert "neuron" in AcceleratorRegistry
    trainer = Trainer(strategy="neuron", accelerator="cpu", devices=1, **QUIET)
    assert isinstance(trainer.strategy, NeuronXLAStrategy)


def test_world_size_must_be_a_multiple_of_tp():
    with pytest.raises(LaunchError, match=r"world size 1 is not divisible by tensor_parallel_size 2.*\[1\]"):
        Trainer(strategy=NeuronXLAStrategy(tensor_parallel_size=2), accelerator="cpu", **QUIET)


def test_accelerator_against_the_environment(monkeypatch):
    monkeypatch.setenv("NEURON_LIGHTNING_BACKEND", "cuda")
    with pytest.raises(ConfigError, match="NEURON_LIGHTNING_BACKEND"):
        Trainer(strategy=NeuronXLAStrategy(), accelerator="cpu", **QUIET)


def test_the_environment_decides_for_auto(monkeypatch):
    monkeypatch.setenv("NEURON_LIGHTNING_BACKEND", "cpu")
    trainer = Trainer(strategy=NeuronXLAStrategy(), **QUIET)
    assert trainer.accelerator.name() == "cpu"
    assert trainer.strategy.root_device == torch.device("cpu")


def test_an_accelerator_that_no_backend_drives():
    from neuron_lightning.lightning.accelerator import backend_name

    with pytest.raises(ConfigError, match=r"'tpu'.*neuron, xla, cuda and cpu"):
        backend_name("tpu")


@pytest.mark.parametrize("name", ["32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_trainer_precision_becomes_ours(name):
    trainer = Trainer(strategy=NeuronXLAStrategy(), accelerator="cpu", precision=name, **QUIET)
    assert isinstance(trainer.precision_plugin, NeuronXLAPrecisionPlugin)
    assert trainer.precision == name


def test_foreign_precision_plugin():
    class Odd(lightning.pytorch.plugins.Precision):
        """Not known."""

    with pytest.raises(ConfigError, match="cannot use the precision plugin Odd"):
        Trainer(strategy=NeuronXLAStrategy(), accelerator="cpu", plugins=[Odd()], **QUIET)


def test_nxd_plugin_argument():
    assert NeuronXLAPrecisionPlugin().precision == "32-true"
    assert NeuronXLAPrecisionPlugin(mixed_precision_enabled=True).precision == "bf16-mixed"
    with pytest.raises(ConfigError, match="pass one of them"):
        NeuronXLAPrecisionPlugin(True, "64-true")
    with pytest.raises(ConfigError, match="unknown precision 'fp8'"):
        NeuronXLAPrecisionPlugin(precision="fp8")
