"""Optimizers on a parallel layout: ZeRO-1, gradient clipping, parameter groups and schedules.

:func:`wrap_optimizer` turns any torch optimizer into a :class:`ParallelOptimizer`;
:func:`initialize_parallel_optimizer` is NxD's way to the same.
"""

from __future__ import annotations

from neuron_lightning.optim.factory import initialize_parallel_optimizer, wrap_optimizer
from neuron_lightning.optim.groups import get_param_groups_by_weight_decay
from neuron_lightning.optim.optimizer import ParallelOptimizer
from neuron_lightning.optim.schedules import (
    get_constant_schedule,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)
from neuron_lightning.optim.state import ParamState

__all__ = [
    "ParallelOptimizer",
    "ParamState",
    "get_constant_schedule",
    "get_constant_schedule_with_warmup",
    "get_cosine_schedule_with_warmup",
    "get_linear_schedule_with_warmup",
    "get_param_groups_by_weight_decay",
    "initialize_parallel_optimizer",
    "wrap_optimizer",
]
