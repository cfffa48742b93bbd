"""The configuration: NxD's arguments and defaults, read as a dict, refused with rule, numbers and remedy."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
from torch import nn

from neuron_lightning.config import NeuronConfig, OptimizerConfig, neuronx_distributed_config
from neuron_lightning.errors import ConfigError

NXD_DEFAULTS = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "expert_parallel_size": 1,
    "context_parallel_size": 1,
    "pipeline_config": None,
    "optimizer_config": {"zero_one_enabled": False, "grad_clipping": True, "max_grad_norm": 1.0},
    "activation_checkpoint_config": None,
    "pad_model": False,
    "sequence_parallel": False,
    "model_init_config": {"sequential_move_factor": 11, "meta_device_init": False, "param_init_fn": None},
    "lora_config": None,
    "mixed_precision_config": {
        "use_master_weights": False,
        "use_fp32_grad_acc": False,
        "use_master_weights_in_ckpt": False,
    },
    "lnc_size": 1,
}


def init_parameters(module: nn.Module, device: Any) -> None:
    """Stands for a user's ``param_init_fn``."""


def test_defaults_are_those_of_nxd() -> None:
    config = neuronx_distributed_config()
    assert config.asdict() == NXD_DEFAULTS
    assert config == NXD_DEFAULTS


def test_reads_like_the_nested_dict() -> None:
    config = neuronx_distributed_config(tensor_parallel_size=8, optimizer_config={"zero_one_enabled": True})
    assert config["tensor_parallel_size"] == config.tensor_parallel_size == 8
    assert config["optimizer_config"]["zero_one_enabled"] is True
    assert config.get("optimizer_config").get("no_such_key", 5) == 5
    assert "lnc_size" in config
    assert "tp" not in config
    assert {**config} == dict(config.items())
    assert list(config.keys()) == list(NXD_DEFAULTS)
    with pytest.raises(KeyError, match="optimizer_config"):
        config["optimizer"]


@pytest.mark.parametrize("zero1", [False, True])
def test_fp32_copies_follow_zero1_unless_given(zero1: bool) -> None:
    config = neuronx_distributed_config(
        optimizer_config={"zero_one_enabled": zero1}, mixed_precision_config={"use_fp32_grad_acc": not zero1}
    )
    assert config.mixed_precision_config.use_master_weights is zero1
    assert config.mixed_precision_config.use_fp32_grad_acc is not zero1


def test_frozen_at_every_level() -> None:
    config = neuronx_distributed_config()
    with pytest.raises(ConfigError, match="frozen"):
        config["tensor_parallel_size"] = 2
    with pytest.raises(ConfigError, match="optimizer_config is frozen"):
        config["optimizer_config"]["max_grad_norm"] = 2.0
    with pytest.raises(ConfigError, match="frozen"):
        config.update(lnc_size=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tensor_parallel_size = 2  # type: ignore[misc]


def test_survives_copies_pickling_and_a_round_trip_through_a_dict() -> None:
    config = neuronx_distributed_config(
        tensor_parallel_size=4,
        activation_checkpoint_config=nn.Linear,
        model_init_config={"meta_device_init": True, "param_init_fn": init_parameters},
    )
    copies = [
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        NeuronConfig.from_any(config.asdict()),
    ]
    assert all(c == config and c.digest() == config.digest() and hash(c) == hash(config) for c in copies)
    assert NeuronConfig.from_any(config) is config
    assert NeuronConfig.from_any(None) == NeuronConfig()


def test_digest_and_flat_text_tell_configs_apart() -> None:
    one = neuronx_distributed_config(optimizer_config={"max_grad_norm": 1.0})
    two = neuronx_distributed_config(optimizer_config={"max_grad_norm": 2.0})
    assert one.digest() != two.digest()
    differing = {k for k, v in one.flat().items() if two.flat()[k] != v}
    assert differing == {"optimizer_config.max_grad_norm"}
    assert all("0x" not in value for value in one.flat().values())


def test_clip_norm_is_none_without_clipping() -> None:
    assert OptimizerConfig(max_grad_norm=3).clip_norm == 3.0
    assert OptimizerConfig(grad_clipping=False).clip_norm is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensor_paralel_size": 2}, "did you mean 'tensor_parallel_size'"),
        ({"optimizer_config": {"zero_one": True}}, "did you mean 'zero_one_enabled'"),
        ({"model_init_config": {"meta_device": True}}, "did you mean 'meta_device_init'"),
        ({"mixed_precision_config": 7}, r"must be a dict .* not 7 \(int\)"),
        ({"tensor_parallel_size": 0}, "positive integer, not 0"),
        ({"tensor_parallel_size": True}, r"not True \(bool\)"),
        ({"tensor_parallel_size": "4"}, r"not '4' \(str\)"),
        ({"sequence_parallel": 1}, r"True or False, not 1 \(int\)"),
        ({"optimizer_config": {"max_grad_norm": 0.0}}, "grad_clipping=False"),
        ({"optimizer_config": {"max_grad_norm": float("nan")}}, "greater than 0"),
        ({"optimizer_config": {"max_grad_norm": None}}, "greater than 0, not None"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
        ({"context_parallel_size": 4}, "context_parallel_size is 4"),
        ({"expert_parallel_size": 0}, "positive integer"),
        ({"pipeline_config": {"num_microbatches": 4}}, "pipeline_config is not supported"),
        ({"lora_config": object()}, "lora_config is not supported"),
        ({"pad_model": True}, "divides the heads"),
        ({"lnc_size": 2}, "NEURON_LOGICAL_NC_CONFIG=2"),
        ({"activation_checkpoint_config": "ful"}, '"full"'),
        ({"activation_checkpoint_config": nn.Linear(1, 1)}, "not an instance"),
        ({"model_init_config": {"sequential_move_factor": 0}}, "positive integer"),
        ({"model_init_config": {"param_init_fn": init_parameters}}, "meta_device_init=True"),
        ({"model_init_config": {"meta_device_init": True, "param_init_fn": 3}}, "must be a function"),
        ({"mixed_precision_config": {"use_master_weights_in_ckpt": True}}, "needs master weights"),
        ({"mixed_precision_config": {"use_master_weights": "yes"}}, "True, False or None"),
    ],
)
def test_bad_input_is_refused_with_its_remedy(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        neuronx_distributed_config(**arguments)


def test_a_config_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match="nxd_config must be a dict"):
        NeuronConfig.from_any([1])  # type: ignore[arg-type]
