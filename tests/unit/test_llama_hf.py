"""Hugging Face folders on one rank: names, the same logits both ways, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuron_lightning.errors import CheckpointError
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM
from neuron_lightning.models.llama_hf import from_hf, from_hf_name, load_hf, save_hf, to_hf_name
from neuron_lightning.parallel.initialize import is_undrawn, materialize
from tests.unit.test_llama import LLAMA3, TINY, ids, tiny


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.layers.3.self_attn.qkv_proj.weight_q", "model.layers.3.self_attn.q_proj.weight"),
        ("model.layers.3.self_attn.qkv_proj.bias_v", "model.layers.3.self_attn.v_proj.bias"),
        ("model.layers.11.mlp.gate_up_proj.weight_0", "model.layers.11.mlp.gate_proj.weight"),
        ("model.layers.11.mlp.gate_up_proj.bias_1", "model.layers.11.mlp.up_proj.bias"),
        ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.o_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_map_both_ways(ours: str, theirs: str) -> None:
    assert to_hf_name(ours) == theirs
    assert from_hf_name(theirs) == ours


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "rope_scaling": LLAMA3},
        {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "rope_theta": 500.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "num_key_value_heads": 4},
    ],
)
def test_transformers_loads_our_folder_and_gives_our_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny(**changes)
    save_hf(model, tmp_path / "hf")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = ids()
    expected = theirs(tokens, labels=tokens)
    output = model(tokens, labels=tokens)
    difference = (output.logits - expected.logits).abs().max()
    assert difference <= min(1e-5, 1e-6 * expected.logits.abs().max())
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)
    again = from_hf(tmp_path / "hf")
    assert again.config == model.config
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_hugging_faces_folder_gives_its_logits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    scaled = {**LLAMA3, "rope_theta": 10000.0}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TINY, rope_parameters=scaled, tie_word_embeddings=True, pad_token_id=0)
    )
    theirs.save_pretrained(tmp_path)
    ours = from_hf(tmp_path)
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[0, :5], mask[1, 11:] = 0, 0
    for kwargs in ({}, {"attention_mask": mask}):
        expected = theirs(tokens, **kwargs).logits
        difference = (ours(tokens, **kwargs).logits - expected)[mask.bool()].abs().max()
        assert difference <= 1e-6
    assert LlamaConfig.from_any(theirs.config) == ours.config


def test_loaded_weights_are_not_drawn_again(tmp_path: Path) -> None:
    model = tiny()
    save_hf(model, tmp_path / "hf")
    with torch.device("meta"):
        empty = LlamaForCausalLM(model.config)
    load_hf(empty, tmp_path / "hf")
    assert not any(is_undrawn(p) for p in empty.parameters())
    assert materialize(empty, seed=3) == []
    assert torch.equal(empty.lm_head.weight, model.lm_head.weight)


def test_large_models_are_cut_into_files(tmp_path: Path) -> None:
    model = tiny()
    save_hf(model, tmp_path / "hf", max_shard_bytes=10_000, dtype=torch.bfloat16)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    tensors = {k: t for f in files for k, t in load_file(tmp_path / "hf" / f).items()}
    assert index["metadata"]["total_size"] == 2 * sum(t.numel() for t in tensors.values())
    assert torch.equal(tensors["lm_head.weight"], model.lm_head.weight.bfloat16())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert torch.equal(from_hf(tmp_path / "hf").lm_head.weight, model.lm_head.weight.bfloat16().float())


def test_existing_folder_is_left_alone_unless_told(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(CheckpointError, match="pass overwrite=True"):
        save_hf(tiny(), tmp_path)
    assert (tmp_path / "note").read_text() == "mine"
    save_hf(tiny(), tmp_path, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert not tmp_path.with_name(tmp_path.name + ".partial").exists()


def test_weights_that_do_not_fit_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    save_hf(tiny(), tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["surprise"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:50].clone()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    model = tiny(initializer_range=0.1)
    before = model.model.embed_tokens.weight.clone()
    with pytest.raises(CheckpointError) as error:
        load_hf(model, tmp_path / "hf")
    for words in (
        "1 missing: model.norm.weight",
        "1 unexpected: surprise",
        "lm_head.weight (50, 32) instead of (96, 32)",
    ):
        assert words in str(error.value)
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_folder_without_safetensors_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors .*pytorch_model\.bin"):
        load_hf(tiny(), tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        from_hf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage!")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        load_hf(tiny(), tmp_path)
