"""The Llama on one rank: against Hugging Face's, its config, its masks, its errors."""

from __future__ import annotations

import fnmatch
import math
from typing import Any

import pytest
import torch

from neuron_lightning.errors import ConfigError
from neuron_lightning.models.attention_mask import attention_mask_of, is_unpadded, mark_unpadded
from neuron_lightning.models.generate import generate
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM, RMSNorm
from neuron_lightning.models.llama_plan import LLAMA_PLAN
from neuron_lightning.models.rope import RotaryTable, rope_frequencies

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**TINY, "initializer_range": 0.2, **changes}))


def ids(batch: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(96, (batch, length), generator=torch.Generator().manual_seed(0))


def test_loss_is_the_mean_over_shifted_labelled_tokens() -> None:
    model, tokens = tiny(), ids()
    labels = tokens.clone()
    labels[0, 3:9] = -100
    output = model(tokens, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].reshape(-1, 96), labels[:, 1:].reshape(-1)
    )
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0)
    assert output.loss is output[0]


def test_batch_without_labels_has_no_loss_and_batch_of_ignored_has_zero() -> None:
    model, tokens = tiny(), ids()
    assert model(tokens).loss is None
    loss = model(tokens, labels=torch.full_like(tokens, -100)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(not p.grad.isnan().any() for p in model.parameters())


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model, tokens = tiny(), ids()
    changed = tokens.clone()
    changed[:, 10:] = 5
    torch.testing.assert_close(model(changed).logits[:, :10], model(tokens).logits[:, :10])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_logits_of_the_rest(side: str) -> None:
    model, tokens, pad = tiny(), ids(1, 12), torch.zeros(1, 4, dtype=torch.long)
    real = slice(4, None) if side == "left" else slice(0, 12)
    padded = torch.cat((pad, tokens) if side == "left" else (tokens, pad), dim=1)
    mask = torch.zeros(1, 16, dtype=torch.long)
    mask[:, real] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    assert not logits.isnan().any()
    torch.testing.assert_close(logits[:, real], model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_marked_mask_takes_the_causal_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny(), ids()
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((kwargs["attn_mask"] is None, kwargs["is_causal"]))
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    ones = torch.ones_like(tokens)
    honoured = model(tokens, attention_mask=ones).logits
    marked = model(tokens, attention_mask=mark_unpadded(ones)).logits
    assert seen == [(False, False)] * 2 + [(True, True)] * 2
    torch.testing.assert_close(honoured, marked, rtol=1e-5, atol=1e-5)
    assert is_unpadded(ones)
    assert not is_unpadded(ones.clone())


def test_strategy_marks_masks_of_ones_while_they_are_on_the_host() -> None:
    from neuron_lightning import NeuronXLAStrategy

    strategy = NeuronXLAStrategy()
    padded = torch.tensor([[1, 1], [1, 0]])
    for mask, marked in (
        (torch.ones(2, 2, dtype=torch.long), True),
        (padded, False),
        (torch.ones(2, 2), False),
    ):
        batch = {"input_ids": ids(2, 2), "attention_mask": mask}
        moved = strategy.batch_to_device(batch, torch.device("cpu"))
        assert is_unpadded(moved["attention_mask"]) is marked


def test_mask_lets_a_token_see_itself_and_earlier_real_ones() -> None:
    mask = attention_mask_of(torch.tensor([[0, 1, 1]]))[0, 0]
    assert mask.tolist() == [[True, False, False], [False, True, False], [False, True, True]]


def test_position_ids_default_to_counting() -> None:
    model, tokens = tiny(), ids()
    counted = model(tokens).logits
    for positions in (torch.arange(16), torch.arange(16).expand(2, 16)):
        assert torch.equal(model(tokens, position_ids=positions).logits, counted)
    assert not torch.allclose(model(tokens, position_ids=2 * torch.arange(16)).logits, counted)


def test_head_is_the_embedding_when_tied() -> None:
    model = tiny(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) + 96 * 32 == sum(p.numel() for p in tiny().parameters())


def test_initial_weights_have_the_configured_spread() -> None:
    model = tiny(initializer_range=0.05)
    weights = torch.cat([p.flatten() for p in model.parameters() if p.dim() > 1])
    assert weights.std().item() == pytest.approx(0.05, rel=0.03)
    assert all(p.eq(1).all() for p in model.parameters() if p.dim() == 1)


def test_float64_stays_float64() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = tiny()
    finally:
        torch.set_default_dtype(torch.float32)
    output = model(ids(), labels=ids())
    assert output.loss.dtype == output.logits.dtype == torch.float64
    doubled = RotaryTable(model.config)(16, None, torch.device("cpu"), torch.float64)[0]
    exact = math.cos(15 * 10000.0 ** (-2 / 8))
    assert doubled[0, 0, 15, 1].item() == pytest.approx(exact, abs=1e-15)


def test_norm_statistics_of_half_precision_are_fp32() -> None:
    norm, x = RMSNorm(64, eps=1e-6).bfloat16(), 300 * torch.randn(4, 64).bfloat16()
    expected = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert torch.equal(norm(x), expected)


def test_sequence_parallel_is_off_on_one_rank() -> None:
    wanted, without = tiny(sequence_parallel=True), tiny(sequence_parallel=False)
    without.load_state_dict(wanted.state_dict())
    assert wanted.sequence_parallel is False
    assert torch.equal(wanted(ids()).logits, without(ids()).logits)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 0}, "hidden_size must be a positive integer, not 0"),
        ({"hidden_size": 30}, r"hidden_size \(30\) must be a multiple of num_attention_heads \(4\)"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of .*\(3\)"),
        ({"head_dim": 7}, "head_dim 7 must be even"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is unknown: choose from default"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs high_freq_factor, low_freq_factor"),
        ({"attention_dropout": 1.5}, "attention_dropout must be in"),
    ],
)
def test_impossible_config_is_an_error(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LlamaConfig(**{**TINY, **changes})


def test_config_of_another_architecture_is_an_error() -> None:
    with pytest.raises(ConfigError, match="model_type 'qwen3' is not a Llama"):
        LlamaConfig.from_any({"model_type": "qwen3"})
    with pytest.raises(ConfigError, match="int is no Llama config"):
        LlamaConfig.from_any(3)
    with pytest.raises(ConfigError, match="quantised"):
        LlamaConfig.from_any({"quantization_config": {"bits": 4}})


def test_config_survives_the_way_to_hugging_face_and_back() -> None:
    config = LlamaConfig(**TINY, rope_theta=5e5, rope_scaling=LLAMA3, tie_word_embeddings=True)
    assert LlamaConfig.from_any(config.to_hf()) == config
    old_style = {k: v for k, v in config.to_hf().items() if k != "rope_parameters"}
    assert LlamaConfig.from_any(old_style) == config
    assert LlamaConfig.from_any(config, pad_vocab=True).pad_vocab


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, r"shape \(batch, sequence\)"),
        ({"input_ids": torch.zeros(1, 4)}, "must be integers"),
        ({"input_ids": torch.zeros(1, 40, dtype=torch.long)}, "has 40 tokens.*max_position_embeddings = 32"),
        ({"input_ids": ids(), "labels": ids(2, 8)}, r"labels must have the shape of input_ids, \(2, 16\)"),
        ({"input_ids": ids(), "attention_mask": ids(1)}, "attention_mask must have the shape"),
    ],
)
def test_wrong_shapes_are_errors(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny()(**arguments)


def test_linear_scaling_stretches_all_waves_and_llama3_only_long_ones() -> None:
    plain = rope_frequencies(LlamaConfig(**TINY, head_dim=64))
    linear = rope_frequencies(
        LlamaConfig(**TINY, head_dim=64, rope_scaling={"type": "linear", "factor": 4.0})
    )
    torch.testing.assert_close(linear, plain / 4)
    llama3 = rope_frequencies(LlamaConfig(**TINY, head_dim=64, rope_scaling=LLAMA3))
    ratio = plain / llama3
    assert ratio[0] == 1.0
    assert ratio[-1] == pytest.approx(8.0)
    assert ((ratio > 1.001) & (ratio < 7.999)).any(), "some waves lie between"


def test_generation_continues_the_prompt_the_same_way_for_a_seed() -> None:
    model, prompt = tiny(eos_token_id=None).train(), ids(2, 4)
    first = generate(model, prompt, 6, seed=1)
    assert first.shape == (2, 10)
    assert torch.equal(first[:, :4], prompt)
    assert torch.equal(first, generate(model, prompt, 6, seed=1))
    assert not torch.equal(first, generate(model, prompt, 6, seed=2))
    assert model.training


def test_generation_greedy_takes_the_likeliest_token() -> None:
    model, prompt = tiny(eos_token_id=None), ids(1, 4)
    greedy = generate(model, prompt, 5, temperature=0)
    assert torch.equal(greedy, generate(model, prompt, 5, top_k=1, seed=9))
    assert greedy[0, 4] == model(prompt).logits[0, -1].argmax()


def test_generation_stops_at_the_end_token_and_slides_past_the_longest_sequence() -> None:
    model, prompt = tiny(eos_token_id=None), ids(1, 30)
    assert generate(model, prompt, 8).shape == (1, 38)
    end = int(generate(model, prompt, 1, temperature=0)[0, -1])
    stopping = tiny(eos_token_id=end)
    stopping.load_state_dict(model.state_dict())
    assert generate(stopping, prompt, 8, temperature=0).shape == (1, 31)
    with pytest.raises(ConfigError, match="temperature"):
        generate(model, prompt, 8, temperature=-1.0)


def test_plan_names_every_module_with_parameters() -> None:
    owners = {name.rpartition(".")[0] for name, _ in tiny().named_parameters()}
    unplanned = [o for o in owners if not any(fnmatch.fnmatchcase(o, pattern) for pattern in LLAMA_PLAN)]
    unused = [p for p in LLAMA_PLAN if not any(fnmatch.fnmatchcase(o, p) for o in owners)]
    assert (unplanned, unused) == ([], [])
