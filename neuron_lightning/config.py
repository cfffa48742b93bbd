"""The training configuration: NxD's ``neuronx_distributed_config`` as frozen, checked dataclasses.

A :class:`NeuronConfig` is made once, checked when made, and never changes. It also reads like the nested dict
that scripts written for NxD index (``config["optimizer_config"]["zero_one_enabled"]``). An option whose
machinery this release lacks is an error, never ignored; ``docs/configuration.md`` says what each one does.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NoReturn, TypeVar

from torch import nn

from neuron_lightning.errors import ConfigError

_SectionT = TypeVar("_SectionT", bound="_Section")


class _Section(Mapping[str, Any]):
    """A frozen dataclass that can be read as a mapping from field names to values."""

    _title: ClassVar[str] = "config"

    def __getitem__(self, key: str) -> Any:
        if key not in _names(type(self)):
            raise KeyError(f"{key!r} is not a key of {self._title}: {_known(key, _names(type(self)))}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(_names(type(self)))

    def __len__(self) -> int:
        return len(_names(type(self)))

    def __hash__(self) -> int:
        return hash(tuple(self.items()))

    def __setitem__(self, key: str, value: Any) -> NoReturn:
        self._refuse_change(key)

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: a config never changes after it was checked."""
        self._refuse_change(", ".join(kwargs) or "…")

    def asdict(self) -> dict[str, Any]:
        """The same content as nested plain dicts."""
        return {k: v.asdict() if isinstance(v, _Section) else v for k, v in self.items()}

    def _refuse_change(self, key: str) -> NoReturn:
        raise ConfigError(
            f"{self._title} is frozen: {key!r} cannot be changed after the values were checked together; "
            "pass it to neuronx_distributed_config(…) instead."
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class OptimizerConfig(_Section):
    """How gradients are reduced, clipped and applied."""

    _title: ClassVar[str] = "optimizer_config"

    zero_one_enabled: bool = False
    """Optimizer state is cut over the data-parallel ranks (ZeRO stage 1)."""
    grad_clipping: bool = True
    """Clip by global norm before each step; off: ``max_grad_norm`` is not used."""
    max_grad_norm: float = 1.0
    """Largest global gradient norm, greater than 0."""

    def __post_init__(self) -> None:
        _check_bools(self, "zero_one_enabled", "grad_clipping")
        norm = self.max_grad_norm
        if isinstance(norm, bool) or not isinstance(norm, (int, float)) or math.isnan(norm) or norm <= 0:
            raise ConfigError(
                f"optimizer_config['max_grad_norm'] must be a number greater than 0, not {norm!r}; "
                "to train without clipping, set grad_clipping=False."
            )

    @property
    def clip_norm(self) -> float | None:
        """``max_grad_norm``, or None when clipping is off."""
        return float(self.max_grad_norm) if self.grad_clipping else None


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedPrecisionConfig(_Section):
    """What is kept in fp32 beside weights of a narrower type. None means "as ``zero_one_enabled``"."""

    _title: ClassVar[str] = "mixed_precision_config"

    use_master_weights: bool | None = None
    """fp32 copies of the weights that the optimizer updates; only for weights narrower than fp32."""
    use_fp32_grad_acc: bool | None = None
    """Gradients accumulate in fp32; only for weights narrower than fp32."""
    use_master_weights_in_ckpt: bool = False
    """True needs master weights. Checkpoints hold them whenever they exist: without, no resume is exact."""

    def __post_init__(self) -> None:
        _check_bools(self, "use_master_weights", "use_fp32_grad_acc", none_allowed=True)
        _check_bools(self, "use_master_weights_in_ckpt")

    def resolved(self, zero1: bool) -> MixedPrecisionConfig:
        """The same with each None replaced by ``zero1``."""
        master = zero1 if self.use_master_weights is None else self.use_master_weights
        fp32 = zero1 if self.use_fp32_grad_acc is None else self.use_fp32_grad_acc
        if self.use_master_weights_in_ckpt and not master:
            raise ConfigError(
                "mixed_precision_config: use_master_weights_in_ckpt=True needs master weights, but "
                f"use_master_weights is {self.use_master_weights} with zero_one_enabled={zero1}; "
                "set use_master_weights=True."
            )
        return replace(self, use_master_weights=master, use_fp32_grad_acc=fp32)


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelInitConfig(_Section):
    """How the model comes into being."""

    _title: ClassVar[str] = "model_init_config"

    sequential_move_factor: int = 11
    """NxD's bound on ranks that move a model at once. Any positive value is met: a rank only builds its shard."""
    meta_device_init: bool = False
    """Build the model without memory, then draw each parameter directly on its device."""
    param_init_fn: Callable[..., Any] | None = None
    """``fn(module, device)`` that gives memory and values to the parameters a meta module owns itself."""

    def __post_init__(self) -> None:
        _check_size("model_init_config['sequential_move_factor']", self.sequential_move_factor)
        _check_bools(self, "meta_device_init")
        if self.param_init_fn is not None and not callable(self.param_init_fn):
            raise ConfigError(
                "model_init_config['param_init_fn'] must be a function fn(module, device), "
                f"not {_kind(self.param_init_fn)}."
            )
        if self.param_init_fn is not None and not self.meta_device_init:
            raise ConfigError(
                "model_init_config: param_init_fn is called for modules on the meta device only, but "
                "meta_device_init is False, so it would never run; set meta_device_init=True, or drop it."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class NeuronConfig(_Section):
    """Everything that decides how a model is laid out and optimised. Equal on all ranks.

    Made by :func:`neuronx_distributed_config`, or from any mapping with its keys by :meth:`from_any`.
    """

    _title: ClassVar[str] = "nxd_config"

    tensor_parallel_size: int = 1
    """Ranks that share one copy of the weights."""
    pipeline_parallel_size: int = 1
    """1 in this release."""
    expert_parallel_size: int = 1
    """1 in this release."""
    context_parallel_size: int = 1
    """1 in this release."""
    pipeline_config: None = None
    """None in this release."""
    optimizer_config: OptimizerConfig = field(default_factory=OptimizerConfig)
    activation_checkpoint_config: str | type[nn.Module] | None = None
    """None, ``"full"`` (every block of the model's layer lists), or the module class to recompute."""
    pad_model: bool = False
    """False in this release."""
    sequence_parallel: bool = False
    """Activations between tensor-parallel layers are cut along the sequence."""
    model_init_config: ModelInitConfig = field(default_factory=ModelInitConfig)
    lora_config: None = None
    """None in this release."""
    mixed_precision_config: MixedPrecisionConfig = field(default_factory=MixedPrecisionConfig)
    """Holds no None once it is part of a NeuronConfig."""
    lnc_size: int = 1
    """1: the runtime's logical cores are the devices (see :func:`neuronx_distributed_config`)."""

    def __post_init__(self) -> None:
        for name, kind in _SECTIONS.items():
            object.__setattr__(self, name, _section(kind, getattr(self, name)))
        mixed = self.mixed_precision_config.resolved(self.optimizer_config.zero_one_enabled)
        object.__setattr__(self, "mixed_precision_config", mixed)
        _check_size("tensor_parallel_size", self.tensor_parallel_size)
        _check_bools(self, "pad_model", "sequence_parallel")
        _check_activation_checkpoint(self.activation_checkpoint_config)
        _check_what_is_not_there(self)

    @classmethod
    def from_any(cls, config: Mapping[str, Any] | None) -> NeuronConfig:
        """``config`` itself if it is one already, else checked from a mapping; None gives the defaults."""
        return _section(cls, config)

    def flat(self) -> dict[str, str]:
        """Every value as text under its dotted name, to compare ranks and runs key by key."""
        text: dict[str, str] = {}
        for name, value in self.items():
            if isinstance(value, _Section):
                text.update({f"{name}.{key}": _text(inner) for key, inner in value.items()})
            else:
                text[name] = _text(value)
        return text

    def digest(self) -> str:
        """SHA-256 of :meth:`flat` in hexadecimal: equal exactly if the configs mean the same."""
        return hashlib.sha256(json.dumps(self.flat(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class AsyncSave:
    """How checkpoints are written in the background."""

    memory_budget_gib: float | None = None
    """Host memory that the snapshot of one rank may take, in GiB; larger ones are written while training waits."""

    def __post_init__(self) -> None:
        budget = self.memory_budget_gib
        if budget is None:
            return
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
            raise ConfigError(
                f"AsyncSave(memory_budget_gib={budget!r}) must be a number of GiB greater than 0, or None for no "
                "limit; to write while training waits, use async_save=False."
            )

    @property
    def memory_budget(self) -> int | None:
        """The budget in bytes."""
        return None if self.memory_budget_gib is None else int(self.memory_budget_gib * 2**30)

    @classmethod
    def from_any(cls, value: Any) -> AsyncSave | None:
        """True is the default, False and None mean not at all. Raises :class:`ConfigError` for anything else."""
        if isinstance(value, cls):
            return value
        if value is None or isinstance(value, bool):
            return cls() if value else None
        raise ConfigError(f"async_save must be True, False or AsyncSave(…), not {_kind(value)}.")


_SECTIONS: dict[str, type[_Section]] = {
    "optimizer_config": OptimizerConfig,
    "model_init_config": ModelInitConfig,
    "mixed_precision_config": MixedPrecisionConfig,
}


def neuronx_distributed_config(
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    expert_parallel_size: int = 1,
    context_parallel_size: int = 1,
    pipeline_config: Mapping[str, Any] | None = None,
    optimizer_config: Mapping[str, Any] | None = None,
    activation_checkpoint_config: str | type[nn.Module] | None = None,
    pad_model: bool = False,
    sequence_parallel: bool = False,
    model_init_config: Mapping[str, Any] | None = None,
    lora_config: Any = None,
    mixed_precision_config: Mapping[str, Any] | None = None,
    lnc_size: int = 1,
    **unknown: Any,
) -> NeuronConfig:
    """Checks NxD's arguments and returns them as one frozen config that also reads like NxD's dict.

    Args:
        tensor_parallel_size: ranks that share one copy of the weights; the world size is a multiple of it.
        pipeline_parallel_size: must be 1 in this release.
        expert_parallel_size: must be 1 in this release.
        context_parallel_size: must be 1 in this release.
        pipeline_config: must be None in this release.
        optimizer_config: ``zero_one_enabled`` (False), ``grad_clipping`` (True), ``max_grad_norm`` (1.0).
        activation_checkpoint_config: None, ``"full"``, or a module class.
        pad_model: must be False in this release; layers pad their own sizes by ``pad=True``.
        sequence_parallel: cut activations along the sequence between tensor-parallel layers.
        model_init_config: ``sequential_move_factor`` (11), ``meta_device_init`` (False),
            ``param_init_fn`` (None).
        lora_config: must be None in this release.
        mixed_precision_config: ``use_master_weights`` and ``use_fp32_grad_acc`` (None: as
            ``zero_one_enabled``), ``use_master_weights_in_ckpt`` (False).
        lnc_size: must be 1: logical cores are configured in the Neuron runtime's own environment.
        **unknown: anything else is an error that names the nearest argument.

    Raises:
        ConfigError: an unknown key, a wrong type, or values that cannot work together.
    """
    given = dict(locals())
    return NeuronConfig.from_any({**given.pop("unknown"), **given})


def _section(kind: type[_SectionT], value: Any) -> _SectionT:
    if isinstance(value, kind):
        return value
    if value is None:
        return kind()
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{kind._title} must be a dict (keys: {', '.join(_names(kind))}) or None, not {_kind(value)}."
        )
    for key in value:
        if key not in _names(kind):
            raise ConfigError(f"unknown key {key!r} in {kind._title}: {_known(key, _names(kind))}")
    return kind(**value)


def _check_bools(section: _Section, *names: str, none_allowed: bool = False) -> None:
    for name in names:
        value = section[name]
        if not (isinstance(value, bool) or (value is None and none_allowed)):
            kinds = "True, False or None" if none_allowed else "True or False"
            raise ConfigError(
                f"{section._title}[{name!r}] must be {kinds}, not {_kind(value)}; pass bool(…) of it if that is meant."
            )


def _check_size(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be a positive integer, not {_kind(value)}.")
    if value < 1:
        raise ConfigError(f"{name} must be a positive integer, not {value}; 1 is the smallest.")


def _check_activation_checkpoint(value: Any) -> None:
    if value is None or value == "full" or (isinstance(value, type) and issubclass(value, nn.Module)):
        return
    raise ConfigError(
        'activation_checkpoint_config must be None, "full" or a class derived from torch.nn.Module '
        f"(the class itself, not an instance or its name), not {_kind(value)}."
    )


def _check_what_is_not_there(config: NeuronConfig) -> None:
    for name in ("pipeline_parallel_size", "expert_parallel_size", "context_parallel_size"):
        _check_size(name, config[name])
        if config[name] != 1:
            raise ConfigError(
                f"{name} is {config[name]}, but this release supports only 1; set it to 1 and let "
                "tensor_parallel_size and data parallelism (the remaining ranks) share the model and the batch."
            )
    for name in ("pipeline_config", "lora_config"):
        if config[name] is not None:
            raise ConfigError(
                f"{name} is not supported by this release; leave it None (it is {_kind(config[name])})."
            )
    if config.pad_model:
        raise ConfigError(
            "pad_model=True is not supported by this release: attention heads are never padded; choose a "
            "tensor_parallel_size that divides the heads, and pad a vocabulary by the layer's pad=True."
        )
    _check_size("lnc_size", config.lnc_size)
    if config.lnc_size != 1:
        raise ConfigError(
            f"lnc_size is {config.lnc_size}, but must be 1: a device here is what the Neuron runtime shows as one "
            f"core; set NEURON_LOGICAL_NC_CONFIG={config.lnc_size} in the job's environment and leave lnc_size alone."
        )


def _names(kind: type[_Section]) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind))  # type: ignore[arg-type]


def _known(key: Any, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(key), list(names), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known keys: {', '.join(names)}."


def _kind(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _text(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    return repr(value) if name is None else f"{value.__module__}.{name}"
