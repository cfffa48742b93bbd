"""The collectives that Lightning asks a strategy for, over the right groups.

Metrics are averaged over the data-parallel ranks (tensor-parallel ranks hold equal values, so the world would
count each several times over); an explicit group wins. Decisions travel on the CPU, over all ranks.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from neuron_lightning.backends import get_backend
from neuron_lightning.errors import ConfigError
from neuron_lightning.parallel import mesh

T = TypeVar("T")

_OPS = {
    "mean": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "prod": dist.ReduceOp.PRODUCT,
    "product": dist.ReduceOp.PRODUCT,
}


def is_distributed() -> bool:
    """Whether a default process group exists."""
    return dist.is_available() and dist.is_initialized()


def gather_objects(value: T) -> list[T]:
    """``value`` of every rank, in rank order. All ranks together."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


class CollectivesMixin(ParallelStrategy):
    """``reduce``, ``broadcast``, ``barrier`` and ``reduce_boolean_decision`` of the strategy."""

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduces ``tensor`` in place over ``group`` and returns it; anything but a tensor is returned as is.

        Args:
            tensor: any shape and dtype. A mean of integers is rounded towards zero, as in Lightning.
            group: process group; default: this rank's data-parallel group.
            reduce_op: ``mean``/``avg``, ``sum``, ``max``, ``min``, ``prod``, or a ``ReduceOp``.

        Raises:
            ConfigError: an unknown operation.
        """
        if not isinstance(tensor, Tensor) or not is_distributed():
            return tensor
        group = mesh.current().group("dp") if group is None else group
        name = reduce_op.lower() if isinstance(reduce_op, str) else None
        if name is not None and name not in _OPS:
            raise ConfigError(f"unknown reduce_op {reduce_op!r}: it must be one of {', '.join(_OPS)}.")
        averaged = name in ("mean", "avg") or reduce_op is None or reduce_op == dist.ReduceOp.AVG
        op = dist.ReduceOp.SUM if averaged else (_OPS[name] if name is not None else reduce_op)
        size = dist.get_world_size(group)
        if size == 1:
            return tensor
        get_backend().all_reduce(tensor, group, op)
        if averaged and tensor.is_floating_point():
            tensor.div_(size)
        elif averaged:
            tensor.copy_(tensor / size)
        return tensor

    def barrier(self, name: str | None = None) -> None:
        """Waits for all ranks, on the host."""
        if is_distributed() and dist.get_world_size() > 1:
            dist.all_reduce(torch.zeros(1, device="cpu"))

    def broadcast(self, obj: T, src: int = 0) -> T:
        """``obj`` of global rank ``src``, on all ranks."""
        if not is_distributed():
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether ``decision`` holds on all ranks (or, with ``all=False``, on any)."""
        if not is_distributed():
            return decision
        votes = torch.tensor([int(decision)], device="cpu")
        dist.all_reduce(votes)
        return int(votes.numpy()[0]) >= (dist.get_world_size() if all else 1)
