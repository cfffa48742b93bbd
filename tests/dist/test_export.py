"""From a training checkpoint of any layout to ``transformers``, and what a checkpoint takes on disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint import manifest
from neuron_lightning.cli.main import main
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM
from neuron_lightning.optim import ParallelOptimizer, get_param_groups_by_weight_decay
from neuron_lightning.parallel import mesh
from neuron_lightning.parallel.initialize import deferred_init, materialize
from neuron_lightning.testing import RankPool
from tests.devices import default_dtype, layout
from tests.unit.formats_cases import write_config

SHAPE: dict[str, Any] = {
    "vocab_size": 50,  # padded at tp = 4
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,  # repeated at tp = 4
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_vocab": True,
}
LARGE = {**SHAPE, "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512}
LAYOUTS = [(1, True), (2, True), (4, True), (2, False), (4, False)]


def ids() -> Tensor:
    return torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(3))


def rank_trains(path: str, tp: int, zero1: bool, shape: dict[str, Any], dtype: str) -> Tensor:
    """Trains two steps and saves; this rank's slice of the logits of :func:`ids`."""
    with layout(tp), default_dtype(getattr(torch, dtype)):
        with deferred_init():
            module = torch.nn.Module()
            module.model = LlamaForCausalLM(LlamaConfig(**shape))
        materialize(module, seed=5)
        groups = get_param_groups_by_weight_decay(module)
        adam = torch.optim.AdamW(groups, lr=1e-2, foreach=False)
        optimizer = ParallelOptimizer(adam, zero1=zero1, master_weights=dtype == "bfloat16")
        for step in range(2):
            tokens = (ids() + step + mesh.current().coordinates["dp"]) % 50
            module.model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        checkpoint.write_checkpoint(
            path,
            module_state=module.state_dict(),
            parameters=dict(module.named_parameters()),
            optimizers=[optimizer],
            trainer_state={"global_step": 2, "epoch": 0},
        )
        with torch.no_grad():
            return module.model(ids()).logits.float().clone()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "zero1"), LAYOUTS)
def test_transformers_computes_the_same_logits(
    pool4: RankPool, tmp_path: Path, tp: int, zero1: bool, tied: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {**SHAPE, "tie_word_embeddings": tied}
    slices = pool4.run(rank_trains, str(tmp_path / "a"), tp, zero1, shape, "float32")
    logits = torch.cat(slices[:tp], -1)[..., :50]
    config = write_config(tmp_path / "config.json", LlamaConfig(**shape))
    arguments = ["convert", tmp_path / "a", tmp_path / "hf", "--to", "hf", "--config", config]
    assert main([str(argument) for argument in arguments]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert model.config.tie_word_embeddings == tied
    assert model.get_input_embeddings().weight.shape[0] == 50
    with torch.no_grad():
        assert (model(ids()).logits - logits).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tp", "zero1"), LAYOUTS)
def test_size_on_disk_is_that_of_the_unique_bytes(
    pool4: RankPool, tmp_path: Path, tp: int, zero1: bool, dtype: str
) -> None:
    pool4.run(rank_trains, str(tmp_path / "a"), tp, zero1, LARGE, dtype)
    here = [p for p in (tmp_path / "a").iterdir() if p.is_file()]
    on_disk = sum(path.stat().st_size for path in here)
    weights = sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**LARGE)).parameters())
    states = 2 * 4 if dtype == "float32" else 2 * 4 + 4  # both moments and the master weight in fp32
    unique = weights * (getattr(torch, dtype).itemsize + states)
    stored = manifest.read(tmp_path / "a").tensors
    tensors = {n: r for n, r in stored.items() if n.startswith(("model/", "optimizer."))}
    assert sum(math.prod(r.shape) * r.dtype.itemsize for r in tensors.values()) == unique
    assert unique > 10_000_000
    assert on_disk / unique - 1 < 0.01, (on_disk, unique)
