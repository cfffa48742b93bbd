"""Tensor parallelism for any module, by a plan: which of its layers are cut, and how.

A plan maps module-name patterns to styles. ``*`` in a pattern stands for one component of a name
(``layers.*.mlp.up``); within a component the wildcards of :mod:`fnmatch` work.

=====================  ==========================================================================================
style                  the layer becomes
=====================  ==========================================================================================
``column``             ``nn.Linear`` cut by output features, output stays cut
``column_gather``      the same, every rank gets the whole output (padded inside if it does not divide)
``row``                ``nn.Linear`` cut by input features, the input is already cut
``row_scatter_input``  the same, the input is whole and is cut first
``embedding``          ``nn.Embedding`` cut by vocabulary (padded inside if it does not divide)
``embedding_dim``      ``nn.Embedding`` cut by embedding dimension
``replicated``         unchanged, written down for the reader
``sequence``           unchanged, but its gradients are partial sums: each rank applies it to a part of the
                       activations (norms under sequence parallel, norms of single attention heads)
=====================  ==========================================================================================

Plans that Hugging Face models ship (``_tp_plan``, ``base_model_tp_plan``) use other words for the same styles;
they are understood too. What a model computes from sizes of its own must use local sizes: Hugging Face's
attention infers its heads from the projections, others need their number of heads divided by the
tensor-parallel size.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from neuron_lightning.errors import ConfigError
from neuron_lightning.parallel.collectives import tensor_parallel
from neuron_lightning.parallel.initialize import Init, deferred_init, load_global, set_init
from neuron_lightning.parallel.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear

_log = logging.getLogger(__name__)

APPLIED = "_nl_tp_plan_applied"
"""Attribute of a module that :func:`parallelize` has changed: its plan."""

STYLES = (
    "column",
    "column_gather",
    "row",
    "row_scatter_input",
    "embedding",
    "embedding_dim",
    "replicated",
    "sequence",
)

HUGGING_FACE_STYLES = {
    "colwise": "column",
    "colwise_rep": "column_gather",
    "colwise_gather_output": "column_gather",
    "rowwise": "row",
    "rowwise_rep": "row_scatter_input",
    "rowwise_split_input": "row_scatter_input",
    "embedding_rowwise": "embedding",
    "embedding_colwise": "embedding_dim",
    "replicate": "replicated",
    "replicated_with_grad_allreduce": "sequence",
}


@dataclass(frozen=True)
class _Settings:
    """What holds for all layers of one call."""

    sequence_dimension: int | None
    init_std: float | None


def parallelize(
    module: nn.Module,
    plan: Mapping[str, str] | None = None,
    *,
    sequence_parallel: bool = False,
    sequence_dimension: int = 0,
) -> nn.Module:
    """Replaces layers of ``module`` by parallel ones, in place, keeping this rank's slices of their weights.

    dtype, device, ``requires_grad`` and ties are kept; weights on ``meta`` stay there for
    :func:`~neuron_lightning.parallel.initialize.materialize`. Every rank calls it with the same plan, after
    the mesh exists. The weights of all ranks must be equal before.

    Args:
        module: the model.
        plan: pattern -> style; None: the plan that a Hugging Face model ships.
        sequence_parallel: whether activations outside the parallel regions are sharded along the sequence.
        sequence_dimension: where the sequence is then.

    Returns:
        ``module``.

    Raises:
        ConfigError: an unknown style, a pattern that matches nothing, a layer of the wrong type, sizes that
            cannot be cut, or a plan that was applied before.
    """
    if (applied := getattr(module, APPLIED, None)) is not None:
        raise ConfigError(
            f"a plan of {len(applied)} patterns was applied to this {type(module).__name__} already: a layer can "
            "be cut once; build the model again to apply another plan."
        )
    shipped = plan is None
    given = dict(shipped_plan(module) if plan is None else plan)
    styles = {pattern: _style(pattern, style) for pattern, style in given.items()}
    targets = _match(module, styles, must_match=not shipped)
    _check_heads(module)
    config = getattr(module, "config", None)
    settings = _Settings(
        sequence_dimension=sequence_dimension if sequence_parallel else None,
        init_std=getattr(config, "initializer_range", None),
    )
    _include_ties(module, targets)
    _apply(module, targets, settings)
    setattr(module, APPLIED, given)
    return module


def shipped_plan(module: nn.Module) -> dict[str, str]:
    """The plan that a Hugging Face model brings with it, with full module names.

    Raises:
        ConfigError: it brings none.
    """
    config, prefix = getattr(module, "config", None), getattr(module, "base_model_prefix", "")
    base = getattr(config, "base_model_tp_plan", None) or {}
    has_prefix = bool(prefix) and hasattr(module, prefix)
    plan = {f"{prefix}.{pattern}" if has_prefix else pattern: style for pattern, style in base.items()}
    plan.update(getattr(type(module), "_tp_plan", None) or {})
    if not plan:
        raise ConfigError(
            f"{type(module).__name__} ships no tensor-parallel plan (config.base_model_tp_plan, _tp_plan): pass "
            f"one, a dict of module-name pattern -> one of {', '.join(STYLES)}."
        )
    return plan


def _style(pattern: str, style: str) -> str:
    resolved = HUGGING_FACE_STYLES.get(style, style)
    if resolved not in STYLES:
        raise ConfigError(
            f"unknown style {style!r} for {pattern!r} in the tensor-parallel plan: known are "
            f"{', '.join(STYLES)}, and Hugging Face's {', '.join(HUGGING_FACE_STYLES)}."
        )
    return resolved


def _match(module: nn.Module, styles: Mapping[str, str], *, must_match: bool) -> dict[str, str]:
    """Module name -> style."""
    names = [name for name, _ in module.named_modules() if name]
    targets: dict[str, str] = {}
    for pattern, style in styles.items():
        matching = [name for name in names if _matches(name, pattern)]
        if not matching and must_match:
            close = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3)
            raise ConfigError(
                f"the pattern {pattern!r} of the tensor-parallel plan matches no module: '*' stands for one "
                f"component of a name; similar names: {', '.join(close) or ', '.join(names[:5])}."
            )
        for name in matching:
            if targets.setdefault(name, style) != style:
                raise ConfigError(
                    f"the tensor-parallel plan gives {name!r} two styles, {targets[name]!r} and {style!r}: "
                    f"narrow one of its patterns ({pattern!r} and another)."
                )
    return targets


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(
        fnmatch.fnmatchcase(part, p) for part, p in zip(parts, patterns, strict=True)
    )


def _check_heads(module: nn.Module) -> None:
    """A Hugging Face model's heads must divide: a cut through a head would not fail, only compute nonsense."""
    size, config = tensor_parallel().size, getattr(module, "config", None)
    for attribute in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, attribute, None)
        if isinstance(heads, int) and heads % size:
            raise ConfigError(
                f"config.{attribute} {heads} is not divisible by the tensor-parallel size {size}: every rank "
                "needs whole heads; choose a size that divides it, or neuron_lightning.models for models with "
                "fewer key-value heads than ranks."
            )


def _include_ties(module: nn.Module, targets: dict[str, str]) -> None:
    """An embedding that is tied to a layer that is cut by output features is cut in the same way."""
    owners: dict[int, list[str]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        for param in child.parameters(recurse=False):
            owners.setdefault(id(param), []).append(name)
    for names in owners.values():
        if not any(targets.get(n, "").startswith("column") for n in names):
            continue
        for name in names:
            if name not in targets and isinstance(module.get_submodule(name), nn.Embedding):
                targets[name] = "embedding"
                _log.info("%s is tied to %s and is cut by vocabulary like it", name, ", ".join(names))


def _apply(module: nn.Module, targets: Mapping[str, str], settings: _Settings) -> None:
    cut: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    replaced: dict[int, tuple[nn.Module, nn.Module]] = {}
    for name, style in targets.items():
        old = module.get_submodule(name)
        if style == "sequence":
            for param in old.parameters():
                param.sequence_parallel_enabled = True  # type: ignore[attr-defined]
        if style in ("sequence", "replicated"):
            continue
        if id(old) not in replaced:
            new = _make(name, old, style, settings)
            for leaf, param in list(old.named_parameters(recurse=False)):
                new.register_parameter(leaf, _moved(name, param, new.get_parameter(leaf), cut))
            replaced[id(old)] = (old, new)
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, replaced[id(old)][1])
    _check_ties(module, cut)


def _make(name: str, old: nn.Module, style: str, settings: _Settings) -> nn.Module:
    """An undrawn parallel layer of the old one's sizes, dtype and device."""
    kind = nn.Embedding if style.startswith("embedding") else nn.Linear
    if not isinstance(old, kind):
        raise ConfigError(
            f"{name!r} is a {type(old).__name__}, but style {style!r} of the tensor-parallel plan is for "
            f"{kind.__name__}: correct the pattern or the style."
        )
    if old._forward_hooks or old._forward_pre_hooks or old._backward_hooks:
        raise ConfigError(
            f"{name!r} has hooks, which would be lost when it is replaced: register them after parallelize()."
        )
    try:
        with deferred_init():
            new = _build(old, style, settings)
    except ConfigError as error:
        raise ConfigError(f"{name!r} cannot be cut as {style!r}: {error}") from error
    if settings.init_std is not None:
        method = functools.partial(nn.init.normal_, std=settings.init_std)
        zero_rows = (
            (old.padding_idx,) if isinstance(old, nn.Embedding) and old.padding_idx is not None else ()
        )
        set_init(new.get_parameter("weight"), Init(method=method, zero_rows=zero_rows))
        if getattr(new, "bias", None) is not None:
            set_init(new.get_parameter("bias"), Init(method=nn.init.zeros_))
    return new.train(old.training)


def _build(old: nn.Linear | nn.Embedding, style: str, settings: _Settings) -> nn.Module:
    dtype, device = old.weight.dtype, old.weight.device
    sequence, dimension = settings.sequence_dimension is not None, settings.sequence_dimension
    if isinstance(old, nn.Embedding):
        return ParallelEmbedding(
            old.num_embeddings,
            old.embedding_dim,
            padding_idx=old.padding_idx,
            max_norm=old.max_norm,
            norm_type=old.norm_type,
            scale_grad_by_freq=old.scale_grad_by_freq,
            sparse=old.sparse,
            device=device,
            dtype=dtype,
            shard_across_embedding=style == "embedding_dim",
            pad=True,
            sequence_parallel_enabled=sequence,
            sequence_dimension=dimension,
        )
    if style.startswith("column"):
        return ColumnParallelLinear(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            gather_output=style == "column_gather",
            dtype=dtype,
            device=device,
            sequence_parallel_enabled=sequence,
            sequence_dimension=dimension,
            pad=style == "column_gather",
        )
    return RowParallelLinear(
        old.in_features,
        old.out_features,
        bias=old.bias is not None,
        input_is_parallel=style == "row",
        dtype=dtype,
        device=device,
        sequence_parallel_enabled=sequence,
        sequence_dimension=dimension,
        pad=style == "row_scatter_input",
    )


def _moved(
    name: str, old: nn.Parameter, new: nn.Parameter, cut: dict[int, tuple[nn.Parameter, nn.Parameter]]
) -> nn.Parameter:
    """The new parameter with this rank's slice of the old; the same one again for tied parameters."""
    if id(old) in cut:
        known = cut[id(old)][1]
        if getattr(known, "shard_spec", None) != getattr(new, "shard_spec", None):
            raise ConfigError(
                f"the weight of {name!r} is tied to a layer that the tensor-parallel plan cuts in another way: "
                "tied layers must be cut alike (an embedding by 'embedding', a head by 'column' or "
                "'column_gather')."
            )
        return known
    new.requires_grad_(old.requires_grad)
    if not old.is_meta:
        full: Tensor = old.detach()
        load_global(new, lambda part: full)
    cut[id(old)] = (old, new)
    return new


def _check_ties(module: nn.Module, cut: Mapping[int, tuple[nn.Parameter, nn.Parameter]]) -> None:
    for name, param in module.named_parameters(remove_duplicate=False):
        if id(param) in cut:
            raise ConfigError(
                f"{name!r} is tied to a parameter that the tensor-parallel plan cuts, but is not in the plan "
                "itself: add its module with a style that cuts it in the same way."
            )
