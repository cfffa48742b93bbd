"""Llama (Touvron et al. 2023; Llama 3: Grattafiori et al. 2024), tensor- and sequence-parallel.

Read it from top to bottom. The model never touches a process group: all that ranks exchange is exchanged
inside the layers of ``neuron_lightning.parallel``. Beside this file lie its parallel plan
(``llama_plan.py``), its Hugging Face name map (``llama_hf.py``) and sampling (``generate.py``).

Shape suffixes, all local to this rank:
    B batch, S sequence, D hidden, N query heads, K key/value heads, H width of a head, F = H / 2,
    V vocabulary / tp, I intermediate / tp.
    X: two dimensions, (B, S), or under sequence parallel (S, B), where S between the parallel layers
    (residual stream, norms) is sequence / tp and inside them the whole sequence.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_lightning.errors import ConfigError
from neuron_lightning.models.attention_mask import attention_mask_of, is_unpadded
from neuron_lightning.models.llama_config import LlamaConfig
from neuron_lightning.models.rope import RotaryTable, rotate
from neuron_lightning.parallel import mesh
from neuron_lightning.parallel.layer_base import MarkedModule
from neuron_lightning.parallel.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from neuron_lightning.parallel.loss import parallel_cross_entropy
from neuron_lightning.parallel.qkv import GQAQKVColumnParallelLinear
from neuron_lightning.parallel.random import get_rng_tracker

__all__ = ["LlamaConfig", "LlamaForCausalLM", "LlamaOutput", "RMSNorm"]


class LlamaOutput(NamedTuple):
    """What :class:`LlamaForCausalLM` returns.

    Attributes:
        loss: mean over the tokens of this rank's batch that have a label, fp32 (float64 for float64
            models); None without labels.
        logits: (batch, sequence, vocabulary / tp): each tensor-parallel rank holds its slice.
    """

    loss: Tensor | None
    logits: Tensor


class RMSNorm(MarkedModule):
    """Root-mean-square norm (Zhang and Sennrich 2019); statistics in at least float32.

    Args:
        hidden_size: width.
        eps: added to the mean square.
        sequence_parallel: whether each rank sees a slice of the sequence only, so that the weight's
            gradient is a partial sum.
    """

    def __init__(self, hidden_size: int, *, eps: float, sequence_parallel: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.sequence_parallel = sequence_parallel
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel_enabled = sequence_parallel  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        """Sets the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x_XD: Tensor) -> Tensor:
        """Norms ``x`` (…, hidden) along its last dimension, in its own dtype."""
        wide_XD = x_XD.to(torch.promote_types(x_XD.dtype, torch.float32))
        scale_X1 = torch.rsqrt(wide_XD.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide_XD * scale_X1).to(x_XD.dtype)

    def extra_repr(self) -> str:
        """Width and epsilon, for ``print(model)``."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023)."""

    def __init__(self, config: LlamaConfig, *, sequence_parallel: bool) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.dropout = config.attention_dropout
        self.sequence_parallel = sequence_parallel
        shared = _layer_arguments(config, sequence_parallel) | {"bias": config.attention_bias}
        self.qkv_proj = GQAQKVColumnParallelLinear(
            config.hidden_size,
            [config.num_attention_heads * config.head_size, config.kv_heads * config.head_size],
            gather_output=False,
            kv_size_multiplier=max(1, mesh.current().sizes["tp"] // config.kv_heads),
            **shared,
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_size,
            config.hidden_size,
            input_is_parallel=True,
            **shared,
        )

    def forward(self, x_XD: Tensor, cos_F: Tensor, sin_F: Tensor, mask: Tensor | None) -> Tensor:
        """Attends; ``mask`` (B, 1, S, S) bool, or None for plain causal attention."""
        q, k, v = self.qkv_proj(x_XD)
        # In the values' dtype, which is autocast's where that is on: XLA's autocast leaves attention out.
        q_BNSH = rotate(self._split_heads(q), cos_F, sin_F).to(v.dtype)
        k_BKSH = rotate(self._split_heads(k), cos_F, sin_F).to(v.dtype)
        v_BKSH = self._split_heads(v)
        dropping = self.training and self.dropout > 0
        with get_rng_tracker().fork() if dropping else nullcontext():
            y_BNSH = F.scaled_dot_product_attention(
                q_BNSH,
                k_BKSH,
                v_BKSH,
                attn_mask=mask,
                dropout_p=self.dropout if dropping else 0.0,
                is_causal=mask is None,
                enable_gqa=q_BNSH.shape[1] != k_BKSH.shape[1],
            )
        order = (2, 0, 1, 3) if self.sequence_parallel else (0, 2, 1, 3)
        attended: Tensor = self.o_proj(y_BNSH.permute(order).flatten(2))
        return attended

    def _split_heads(self, x: Tensor) -> Tensor:
        heads = x.view(*x.shape[:2], -1, self.head_size)
        return heads.permute(1, 2, 0, 3) if self.sequence_parallel else heads.transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020); gate and up projections in one product."""

    def __init__(self, config: LlamaConfig, *, sequence_parallel: bool) -> None:
        super().__init__()
        shared = _layer_arguments(config, sequence_parallel) | {"bias": config.mlp_bias}
        self.gate_up_proj = ColumnParallelLinear(
            config.hidden_size, 2 * config.intermediate_size, gather_output=False, stride=2, **shared
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size, config.hidden_size, input_is_parallel=True, **shared
        )

    def forward(self, x_XD: Tensor) -> Tensor:
        """Maps ``x`` (…, hidden) to the same shape."""
        gate_XI, up_XI = self.gate_up_proj(x_XD).chunk(2, dim=-1)
        mapped: Tensor = self.down_proj(F.silu(gate_XI) * up_XI)
        return mapped


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig, *, sequence_parallel: bool) -> None:
        super().__init__()
        norm = partial(
            RMSNorm, config.hidden_size, eps=config.rms_norm_eps, sequence_parallel=sequence_parallel
        )
        self.input_layernorm = norm()
        self.self_attn = Attention(config, sequence_parallel=sequence_parallel)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, sequence_parallel=sequence_parallel)

    def forward(self, x_XD: Tensor, cos_F: Tensor, sin_F: Tensor, mask: Tensor | None) -> Tensor:
        """One layer; see :class:`Attention` for the arguments."""
        x_XD = x_XD + self.self_attn(self.input_layernorm(x_XD), cos_F, sin_F, mask)
        x_XD = x_XD + self.mlp(self.post_attention_layernorm(x_XD))
        return x_XD


class LlamaModel(nn.Module):
    """Embedding, decoder layers, last norm."""

    def __init__(self, config: LlamaConfig, *, sequence_parallel: bool) -> None:
        super().__init__()
        self.embed_tokens = ParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            padding_idx=config.pad_token_id,
            pad=config.pad_vocab,
            **_layer_arguments(config, sequence_parallel),
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, sequence_parallel=sequence_parallel) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, sequence_parallel=sequence_parallel)
        self.rotary = RotaryTable(config)

    def forward(self, input_ids_BS: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Token ids (B, S) to the last hidden states (X, D)."""
        x_XD: Tensor = self.embed_tokens(input_ids_BS)
        cos_F, sin_F = self.rotary(input_ids_BS.shape[1], position_ids, x_XD.device, x_XD.dtype)
        for layer in self.layers:
            x_XD = layer(x_XD, cos_F, sin_F, mask)
        normed: Tensor = self.norm(x_XD)
        return normed


class LlamaForCausalLM(nn.Module):
    """A Llama with its language-model head. Every tensor-parallel rank builds and calls it together.

    Build it inside ``deferred_init()`` and draw it by ``materialize()`` to start from the same weights
    under any layout (the strategy does both).

    Args:
        config: ours, ``transformers``' or a mapping; see :meth:`LlamaConfig.from_any`.

    Raises:
        ConfigError: heads, hidden size, intermediate size or vocabulary do not fit the mesh.
    """

    def __init__(self, config: LlamaConfig | Any) -> None:
        super().__init__()
        self.config = LlamaConfig.from_any(config)
        self.sequence_parallel = _check_layout(self.config)
        self.model = LlamaModel(self.config, sequence_parallel=self.sequence_parallel)
        self.lm_head = ColumnParallelLinear(
            self.config.hidden_size,
            self.config.vocab_size,
            bias=False,
            gather_output=False,
            pad=self.config.pad_vocab,
            **_layer_arguments(self.config, self.sequence_parallel),
        )
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> LlamaOutput:
        """Logits, and with ``labels`` the loss. Every tensor-parallel rank calls it with the same batch.

        Args:
            input_ids: (batch, sequence) int.
            attention_mask: (batch, sequence), 0 for padding; None: nothing is padded. A mask of ones costs
                a slower attention, unless it is marked by ``mark_unpadded`` (the strategy does).
            labels: (batch, sequence) int, usually ``input_ids``: the token after position i is predicted
                at i, so that they are shifted in here. -100 is left out.
            position_ids: (sequence,) or (batch, sequence); None: 0, 1, 2, ….

        Under data parallel each rank's loss is the mean over its own labelled tokens, and gradients are
        averaged over ranks: where ranks hold unequal numbers of labelled tokens, each rank's tokens weigh
        by its own count, as in DistributedDataParallel. A batch without any labelled token has loss 0.

        Raises:
            ConfigError: shapes do not fit each other or the model.
        """
        _check_shapes(self, input_ids, attention_mask=attention_mask, labels=labels)
        if attention_mask is not None and is_unpadded(attention_mask):
            attention_mask = None
        mask = None if attention_mask is None else attention_mask_of(attention_mask)
        hidden_XD = self.model(input_ids, mask, position_ids)
        logits_XV: Tensor = self.lm_head(hidden_XD)
        loss = None if labels is None else self._loss(logits_XV, labels)
        return LlamaOutput(loss, logits_XV.transpose(0, 1) if self.sequence_parallel else logits_XV)

    def _loss(self, logits_XV: Tensor, labels_BS: Tensor) -> Tensor:
        target_BS = F.pad(labels_BS[:, 1:], (0, 1), value=-100)
        target_X = target_BS.t().contiguous() if self.sequence_parallel else target_BS
        loss_X = parallel_cross_entropy(logits_XV, target_X, vocab_size=self.config.vocab_size)
        return loss_X.sum() / (target_X != -100).sum().clamp(min=1)


def _layer_arguments(config: LlamaConfig, sequence_parallel: bool) -> dict[str, Any]:
    return {
        "dtype": torch.get_default_dtype(),
        "init_method": partial(nn.init.normal_, std=config.initializer_range),
        "sequence_parallel_enabled": sequence_parallel,
    }


def _check_layout(config: LlamaConfig) -> bool:
    """Whether sequence parallel is on; raises if the model cannot be cut over the mesh."""
    tp = mesh.current().sizes["tp"]
    for name in ("num_attention_heads", "hidden_size", "intermediate_size"):
        if (size := getattr(config, name)) % tp:
            raise ConfigError(
                f"{name} ({size}) must be a multiple of the tensor-parallel size ({tp}): each rank holds an "
                f"equal share. Choose a tensor-parallel size that divides {size}."
            )
    if config.kv_heads % tp and tp % config.kv_heads:
        raise ConfigError(
            f"num_key_value_heads ({config.kv_heads}) must be a multiple or a divisor of the tensor-parallel "
            f"size ({tp}): a rank holds whole heads, or several ranks share one."
        )
    if config.vocab_size % tp and not config.pad_vocab:
        raise ConfigError(
            f"vocab_size ({config.vocab_size}) must be a multiple of the tensor-parallel size ({tp}): pass "
            f"pad_vocab=True to pad it to {-(-config.vocab_size // tp) * tp}."
        )
    wanted = config.sequence_parallel
    return tp > 1 and (mesh.current().sequence_parallel if wanted is None else wanted)


def _check_shapes(model: LlamaForCausalLM, input_ids: Tensor, **same_shape: Tensor | None) -> None:
    config, tp = model.config, mesh.current().sizes["tp"]
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ConfigError(
            f"input_ids must be integers of shape (batch, sequence), not {input_ids.dtype} of shape "
            f"{tuple(input_ids.shape)}."
        )
    for name, tensor in same_shape.items():
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ConfigError(
                f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}, not "
                f"{tuple(tensor.shape)}."
            )
    length = input_ids.shape[1]
    if length > config.max_position_embeddings:
        raise ConfigError(
            f"the sequence has {length} tokens, the model at most max_position_embeddings = "
            f"{config.max_position_embeddings}: cut the data shorter or build a longer model."
        )
    if model.sequence_parallel and length % tp:
        raise ConfigError(
            f"under sequence parallel the sequence ({length} tokens) must be a multiple of the "
            f"tensor-parallel size ({tp}): pad it to {-(-length // tp) * tp}, or turn sequence_parallel off."
        )
