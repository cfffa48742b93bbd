"""How a Llama is cut over the ranks of a tensor-parallel group, as data.

The first table documents ``llama.py``, whose layers are parallel by construction. The second does the same to
the model of ``transformers``, by ``neuron_lightning.parallel.parallelize``.
"""

from __future__ import annotations

LLAMA_PLAN: dict[str, str] = {
    "model.embed_tokens": "embedding",  # vocabulary; output summed, under sequence parallel scattered
    "model.layers.*.input_layernorm": "sequence",  # whole weight, a slice of the sequence
    "model.layers.*.self_attn.qkv_proj": "column",  # heads; key/value heads repeated if tp exceeds them
    "model.layers.*.self_attn.o_proj": "row",  # heads; output summed or scattered
    "model.layers.*.post_attention_layernorm": "sequence",
    "model.layers.*.mlp.gate_up_proj": "column",  # gate and up each by itself
    "model.layers.*.mlp.down_proj": "row",
    "model.norm": "sequence",
    "lm_head": "column",  # vocabulary; the logits stay sharded for parallel_cross_entropy
}
"""Module of ``LlamaForCausalLM`` to the way it is parallel."""

HF_LLAMA_PLAN: dict[str, str] = {
    "model.embed_tokens": "embedding",
    "model.layers.*.self_attn.q_proj": "column",
    "model.layers.*.self_attn.k_proj": "column",
    "model.layers.*.self_attn.v_proj": "column",
    "model.layers.*.self_attn.o_proj": "row",
    "model.layers.*.mlp.gate_proj": "column",
    "model.layers.*.mlp.up_proj": "column",
    "model.layers.*.mlp.down_proj": "row",
    "lm_head": "column_gather",
}
"""The same for ``transformers.LlamaForCausalLM``, without sequence parallel: whole logits come out."""
