"""The shape of a Llama, under Hugging Face's field names, checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neuron_lightning.errors import ConfigError

ROPE_TYPES = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
}
"""The rotary embeddings that we compute, and the parameters that each needs."""


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A Llama's hyper-parameters; the defaults are Llama-2 7B's, as in ``transformers``.

    Raises:
        ConfigError: a value is out of range, or two of them do not fit together.
    """

    vocab_size: int = 32000
    """Tokens, padding excluded."""
    hidden_size: int = 4096
    """Width of the residual stream."""
    intermediate_size: int = 11008
    """Width between the two halves of the MLP."""
    num_hidden_layers: int = 32
    """Decoder layers."""
    num_attention_heads: int = 32
    """Query heads."""
    num_key_value_heads: int | None = None
    """Key and value heads (grouped-query attention); None: as many as query heads."""
    head_dim: int | None = None
    """Width of a head; None: ``hidden_size // num_attention_heads``."""
    hidden_act: str = "silu"
    """Activation of the gate; only ``silu``."""
    max_position_embeddings: int = 2048
    """Longest sequence."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in the norms."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    rope_scaling: Mapping[str, Any] | None = None
    """``rope_type`` (``default``, ``linear``, ``llama3``) and its parameters, as in ``transformers``."""
    tie_word_embeddings: bool = False
    """Whether the output head is the input embedding."""
    attention_bias: bool = False
    """Whether the attention's projections have biases."""
    mlp_bias: bool = False
    """Whether the MLP's projections have biases."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight in training."""
    pad_token_id: int | None = None
    """The token whose input embedding is not trained; None: all are."""
    bos_token_id: int | None = 1
    """Carried through to the exported config."""
    eos_token_id: int | list[int] | None = 2
    """Where :func:`~neuron_lightning.models.generate.generate` stops."""
    pad_vocab: bool = False
    """Whether a vocabulary that the tensor-parallel size does not divide is padded (never exported)."""
    sequence_parallel: bool | None = None
    """Whether norms and residuals are cut along the sequence; None: as the mesh was told."""

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in _POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"LlamaConfig.{name} must be a positive integer, not {value!r}.")
        if self.head_dim is None:
            _check_divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _check_divides("num_key_value_heads", self.kv_heads, "num_attention_heads", self.num_attention_heads)
        if self.head_size < 2 or self.head_size % 2:
            raise ConfigError(f"rotary embeddings turn pairs: head_dim {self.head_size} must be even.")
        if self.hidden_act != "silu":
            raise ConfigError(f"hidden_act {self.hidden_act!r} is not a Llama's: use 'silu'.")
        if not 0.0 <= self.attention_dropout < 1.0:
            raise ConfigError(f"attention_dropout must be in [0, 1), not {self.attention_dropout!r}.")
        object.__setattr__(self, "rope_scaling", _checked_rope(self.rope_scaling))

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_any(cls, source: Any, **overrides: Any) -> LlamaConfig:
        """From a ``LlamaConfig`` of ours or of ``transformers``, or the mapping in a ``config.json``.

        Args:
            source: the config. Keys that do not change what a Llama computes are passed over.
            **overrides: fields to set on top.

        Raises:
            ConfigError: it describes another architecture, or a setting that we cannot compute.
        """
        if isinstance(source, cls):
            return dataclasses.replace(source, **overrides)
        values = dict(source) if isinstance(source, Mapping) else _to_dict(source)
        if (model_type := values.get("model_type", "llama")) != "llama":
            raise ConfigError(f"model_type {model_type!r} is not a Llama: this model reads 'llama' only.")
        if values.get("quantization_config"):
            raise ConfigError("quantised weights cannot be trained: load the unquantised checkpoint.")
        rope = dict(values.pop("rope_parameters", None) or values.get("rope_scaling") or {})
        values["rope_theta"] = rope.pop("rope_theta", values.get("rope_theta") or cls.rope_theta)
        values["rope_scaling"] = rope or None
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{**{k: v for k, v in values.items() if k in known}, **overrides})

    def to_hf(self) -> dict[str, Any]:
        """The mapping of a ``config.json`` that every ``transformers`` from 4.43 on reads."""
        values = dataclasses.asdict(self)
        for ours in ("pad_vocab", "sequence_parallel"):
            del values[ours]
        scaling = dict(self.rope_scaling) if self.rope_scaling else None
        values["rope_scaling"] = scaling
        values["rope_parameters"] = {
            "rope_type": "default",
            **(scaling or {}),
            "rope_theta": self.rope_theta,
        }
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **values}


_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def _to_dict(source: Any) -> dict[str, Any]:
    if not hasattr(source, "to_dict"):
        raise ConfigError(
            f"a {type(source).__name__} is no Llama config: pass a LlamaConfig (ours or transformers') or a "
            "mapping with the fields of a config.json."
        )
    return dict(source.to_dict())


def _check_divides(small_name: str, small: int, large_name: str, large: int) -> None:
    if large % small:
        raise ConfigError(f"{large_name} ({large}) must be a multiple of {small_name} ({small}).")


def _checked_rope(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A plain ``{"rope_type": …, its parameters}``, or None for unscaled embeddings."""
    if not scaling:
        return None
    values = dict(scaling)
    rope_type = values.pop("type", None) or "default"
    rope_type = values.pop("rope_type", rope_type)
    if rope_type not in ROPE_TYPES:
        raise ConfigError(f"rope_type {rope_type!r} is unknown: choose from {', '.join(ROPE_TYPES)}.")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"a Llama turns whole heads: partial_rotary_factor {values['partial_rotary_factor']} must be 1."
        )
    missing = sorted(ROPE_TYPES[rope_type] - values.keys())
    if missing:
        raise ConfigError(f"rope_type {rope_type!r} needs {', '.join(missing)}: got {sorted(values)}.")
    if rope_type == "default":
        return None
    return {"rope_type": rope_type, **{name: values[name] for name in sorted(ROPE_TYPES[rope_type])}}
