"""Making parallel optimizers: from an instance, or NxD's way from a class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from neuron_lightning.optim.optimizer import ParallelOptimizer


def wrap_optimizer(
    optimizer: Optimizer,
    *,
    zero1: bool,
    max_grad_norm: float | None = None,
    master_weights: bool = False,
    fp32_grad_accumulation: bool = False,
) -> ParallelOptimizer:
    """Wraps ``optimizer``; one that is wrapped already is returned as it is.

    Arguments as for :class:`ParallelOptimizer`. Every rank calls it together.
    """
    if isinstance(optimizer, ParallelOptimizer):
        return optimizer
    return ParallelOptimizer(
        optimizer,
        zero1=zero1,
        max_grad_norm=max_grad_norm,
        master_weights=master_weights,
        fp32_grad_accumulation=fp32_grad_accumulation,
    )


def initialize_parallel_optimizer(
    nxd_config: Mapping[str, Any],
    optimizer_class: type[Optimizer],
    parameters: Iterable[Any],
    *args: Any,
    **kwargs: Any,
) -> ParallelOptimizer:
    """Builds ``optimizer_class(parameters, *args, **kwargs)`` and wraps it as ``nxd_config`` says.

    Args:
        nxd_config: what ``neuronx_distributed_config`` returned, or a dict like it. Read are
            ``optimizer_config``: ``zero_one_enabled``, ``grad_clipping``, ``max_grad_norm``, and
            ``mixed_precision_config``: ``use_master_weights``, ``use_fp32_grad_acc`` (unset: as ZeRO-1).
        optimizer_class: any class of torch's kind.
        parameters: parameters or parameter groups; a group's own settings win over ``kwargs``, as in torch.
        *args: further arguments of the class.
        **kwargs: further arguments of the class.

    Every rank calls it together, after the model is on its device.
    """
    optimizer_config = _section(nxd_config, "optimizer_config")
    precision = _section(nxd_config, "mixed_precision_config")
    zero1 = bool(optimizer_config.get("zero_one_enabled", False))
    clips = optimizer_config.get("grad_clipping", True)
    return ParallelOptimizer(
        optimizer_class(parameters, *args, **kwargs),
        zero1=zero1,
        max_grad_norm=optimizer_config.get("max_grad_norm", 1.0) if clips else None,
        master_weights=_or(precision.get("use_master_weights"), zero1),
        fp32_grad_accumulation=_or(precision.get("use_fp32_grad_acc"), zero1),
    )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section: Mapping[str, Any] | None = config.get(name)
    return {} if section is None else section


def _or(value: bool | None, default: bool) -> bool:
    return default if value is None else bool(value)
