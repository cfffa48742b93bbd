"""The YAML configurations of the examples describe the models that they name."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from neuron_lightning.config import NeuronConfig
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "llama"
PUBLISHED = {"llama-1b": 1_235_814_400, "llama-8b": 8_030_261_248, "llama-70b": 70_553_706_496}


def _config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((EXAMPLES / "configs" / f"{name}.yaml").read_text())
    return config


def _num_parameters(config: dict[str, Any]) -> int:
    shape = LlamaConfig(**config["model"]["llama"], vocab_size=config["data"]["vocab_size"])
    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_shapes_have_the_published_number_of_parameters(name: str) -> None:
    assert _num_parameters(_config(name)) == PUBLISHED[name]


def test_quickstart_is_as_large_as_promised() -> None:
    config = _config("quickstart")
    assert _num_parameters(config) >= 2_000_000
    assert config["data"]["vocab_size"] >= 4096


@pytest.mark.parametrize("name", ["quickstart", *sorted(PUBLISHED)])
def test_layouts_fit_the_shapes(name: str) -> None:
    config = _config(name)
    strategy = config["trainer"]["strategy"]["init_args"]
    nxd = NeuronConfig.from_any(strategy.get("nxd_config"))
    tp = max(nxd.tensor_parallel_size, strategy.get("tensor_parallel_size", 1))
    shape = config["model"]["llama"]
    assert shape["num_attention_heads"] % tp == 0
    assert shape["intermediate_size"] % tp == 0
    assert config["data"]["vocab_size"] % tp == 0
    kv_heads = shape["num_key_value_heads"]
    assert kv_heads % tp == 0 or tp % kv_heads == 0
    assert config["data"]["seq_len"] % tp == 0
    assert config["data"]["seq_len"] <= shape["max_position_embeddings"]


@pytest.mark.parametrize("script", sorted((EXAMPLES / "jobs").iterdir()), ids=lambda path: path.name)
def test_job_scripts_parse(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, check=False).returncode == 0
