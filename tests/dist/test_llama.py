"""The Llama over several ranks: the same logits, loss and gradients as on one, weights in and out at any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from neuron_lightning.checkpoint.boxes import placements
from neuron_lightning.errors import CheckpointError, ConfigError
from neuron_lightning.models.generate import generate
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM
from neuron_lightning.models.llama_hf import from_hf, save_hf
from neuron_lightning.models.llama_plan import HF_LLAMA_PLAN
from neuron_lightning.parallel import activation_checkpoint
from neuron_lightning.parallel.initialize import deferred_init, materialize
from neuron_lightning.parallel.plan import parallelize
from neuron_lightning.testing import RankPool
from tests.devices import device, layout, layout_if

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "eos_token_id": None,
}


def build(**changes: Any) -> LlamaForCausalLM:
    """A float64 model on the current mesh, the same weights at every layout."""
    torch.set_default_dtype(torch.float64)
    try:
        with deferred_init():
            model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))
    finally:
        torch.set_default_dtype(torch.float32)
    materialize(model, seed=5)
    return model


def ids(vocab: int = 96, length: int = 16) -> Tensor:
    return torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(0))


def padding() -> Tensor:
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, :3], mask[1, 12:] = 0, 0
    return mask


def forward_backward(
    tp: int, changes: dict[str, Any], masked: bool = False, checkpointed: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Local logits, loss, and the gradients of the parameters whose gradient is complete on each rank."""
    with layout_if(tp > 1, tp):
        model = build(**changes)
        if checkpointed:
            activation_checkpoint.apply_activation_checkpointing(model, "full")
        tokens = ids(model.config.vocab_size)
        output = model(tokens, attention_mask=padding() if masked else None, labels=tokens)
        output.loss.backward()
        gradients = {
            p.name: param.grad.clone()
            for name, param in model.named_parameters()
            for p in placements(name, param, tp)
            if p.name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight"))
        }
        return output.logits.detach().contiguous(), output.loss.detach(), gradients


CASES = {
    "plain": ({}, {}),
    "sequence parallel": ({"sequence_parallel": True}, {}),
    "tied": ({"tie_word_embeddings": True, "sequence_parallel": True}, {}),
    "one kv head": ({"num_key_value_heads": 1}, {}),
    "biases": ({"attention_bias": True, "mlp_bias": True, "sequence_parallel": True}, {}),
    "padded vocabulary": ({"vocab_size": 93, "pad_vocab": True, "pad_token_id": 0}, {}),
    "padding mask": ({"sequence_parallel": True}, {"masked": True}),
    "activation checkpoints": ({"sequence_parallel": True}, {"checkpointed": True}),
}


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_those_of_one_rank(
    tp: int, case: str, request: pytest.FixtureRequest
) -> None:
    changes, options = CASES[case]
    pool: RankPool = request.getfixturevalue(f"pool{tp}")
    results = pool.run(forward_backward, tp, changes, **options)
    logits, loss, gradients = forward_backward(1, changes, masked=options.get("masked", False))
    vocab = logits.shape[-1]
    ours = torch.cat([r[0] for r in results], dim=-1)[..., :vocab]
    torch.testing.assert_close(ours, logits, rtol=1e-12, atol=1e-12)
    for rank in results:
        torch.testing.assert_close(rank[1], loss, rtol=1e-13, atol=0)
    for name, expected in gradients.items():
        dim = 0 if name.startswith("lm_head") else 1
        joined = torch.cat([r[2][name] for r in results], dim=dim)[: len(expected)]
        torch.testing.assert_close(joined, expected, rtol=1e-11, atol=1e-13)


def load_and_call(tp: int, folder: Path, changes: dict[str, Any]) -> Tensor:
    """Local logits of a Hugging Face folder at ``tp``."""
    with layout_if(tp > 1, tp):
        return from_hf(folder, device=device(), **changes)(ids()).logits.detach().contiguous()


@pytest.mark.parametrize("tied", [False, True])
def test_hugging_face_weights_load_at_tp_1_2_4(
    tmp_path: Path, tied: bool, pool2: RankPool, pool4: RankPool
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=tied)
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    expected = theirs(ids()).logits
    for tp, pool in ((1, None), (2, pool2), (4, pool4)):
        changes = {"sequence_parallel": tp == 4}
        local = pool.run(load_and_call, tp, tmp_path, changes) if pool else [load_and_call(1, tmp_path, {})]
        assert (torch.cat(local, dim=-1) - expected).abs().max() <= 1e-5


def build_and_save(tp: int, folder: Path, changes: dict[str, Any]) -> None:
    with layout(tp):
        save_hf(build(**changes), folder, max_shard_bytes=30_000)


@pytest.mark.parametrize(
    ("tp", "changes"),
    [
        (2, {}),
        (4, {"tie_word_embeddings": True, "sequence_parallel": True}),
        (4, {"num_key_value_heads": 1, "vocab_size": 93, "pad_vocab": True}),
    ],
)
def test_saved_folder_does_not_depend_on_the_layout(
    tmp_path: Path, tp: int, changes: dict[str, Any], pool4: RankPool
) -> None:
    pool4.run(build_and_save, tp, tmp_path / "many", changes)
    save_hf(build(**changes), tmp_path / "one")
    many = {k: t for f in (tmp_path / "many").glob("*.safetensors") for k, t in load_file(f).items()}
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert many.keys() == one.keys()
    assert all(torch.equal(many[name], one[name]) for name in one)
    assert (tmp_path / "many" / "config.json").read_text() == (tmp_path / "one" / "config.json").read_text()


def test_transformers_gives_the_logits_of_a_model_saved_at_tp_2_dp_2(tmp_path: Path, pool4: RankPool) -> None:
    transformers = pytest.importorskip("transformers")
    pool4.run(build_and_save, 2, tmp_path / "hf", {})
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").double()
    difference = (theirs(ids()).logits - build()(ids()).logits).abs().max()
    assert difference <= 1e-5


def save_where_it_cannot(folder: Path) -> str:
    try:
        with layout(2):
            save_hf(build(), folder)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_every_rank_is_told_why_the_folder_cannot_be_written(tmp_path: Path, pool2: RankPool) -> None:
    (tmp_path / "taken").write_text("a file")
    first, second = pool2.run(save_where_it_cannot, tmp_path / "taken")
    for message in (first, second):
        assert "rank 0 could not begin the folder" in message
        assert "exists" in message


def sample(tp: int, sequence_parallel: bool) -> Tensor:
    with layout_if(tp > 1, tp, sequence_parallel=sequence_parallel):
        return generate(
            build(vocab_size=93, pad_vocab=True), ids(93, 5), 6, temperature=0.7, top_k=20, seed=3
        )


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_all_ranks_sample_what_one_rank_samples(pool4: RankPool, sequence_parallel: bool) -> None:
    expected = sample(1, False)
    for tp in (2, 4):
        assert all(torch.equal(tokens, expected) for tokens in pool4.run(sample, tp, sequence_parallel))


def dropped(tp: int) -> list[Tensor]:
    with layout(tp):
        torch.manual_seed(0)
        model = build(attention_dropout=0.5, vocab_size=96)
        return [model.train()(ids()).logits.detach(), model.eval()(ids()).logits.detach()]


def test_attention_dropout_drops_in_training_only(pool2: RankPool) -> None:
    results = pool2.run(dropped, 2)
    expected, _, _ = forward_backward(1, {})
    train, evaluated = (torch.cat([r[i] for r in results], dim=-1) for i in (0, 1))
    torch.testing.assert_close(evaluated, expected, rtol=1e-12, atol=1e-12)
    assert (train - expected).norm() > 0.05 * expected.norm()


def build_badly(tp: int, changes: dict[str, Any], length: int) -> str:
    try:
        with layout(tp):
            build(**changes)(ids(length=length))
    except ConfigError as error:
        return str(error)
    return "worked"


@pytest.mark.parametrize(
    ("changes", "length", "words"),
    [
        ({"num_attention_heads": 2}, 16, "num_attention_heads (2) must be a multiple of the tensor-parallel"),
        (
            {"hidden_size": 30, "head_dim": 4},
            16,
            "hidden_size (30) must be a multiple of the tensor-parallel",
        ),
        ({"intermediate_size": 50}, 16, "intermediate_size (50) must be"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 4},
            16,
            "num_key_value_heads (3) must be a multiple or a divisor of the tensor-parallel size (4)",
        ),
        ({"vocab_size": 94}, 16, "pass pad_vocab=True to pad it to 96"),
        ({"sequence_parallel": True}, 15, "sequence (15 tokens) must be a multiple of"),
        ({}, 33, "has 33 tokens, the model at most max_position_embeddings = 32"),
    ],
)
def test_what_cannot_be_cut_is_an_error_on_all_ranks(
    pool4: RankPool, changes: dict[str, Any], length: int, words: str
) -> None:
    messages = pool4.run(build_badly, 4, changes, length)
    assert all(words in message for message in messages), messages


def hf_logits(folder: Path) -> Tensor:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with layout(2):
        parallelize(model.to(device()), HF_LLAMA_PLAN)
        logits: Tensor = model(ids()).logits.detach()
        return logits


def test_plan_for_hugging_faces_model_keeps_its_logits(tmp_path: Path, pool2: RankPool) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).double()
    theirs.save_pretrained(tmp_path)
    for logits in pool2.run(hf_logits, tmp_path):
        torch.testing.assert_close(logits, theirs(ids()).logits, rtol=1e-11, atol=1e-11)
