"""Reductions under torch_xla's names, on any group and any process-group backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from neuron_lightning.backends import get_backend
from neuron_lightning.compat.groups import Group
from neuron_lightning.errors import ConfigError

REDUCE_SUM = "sum"
REDUCE_MUL = "mul"
REDUCE_AND = "and"
REDUCE_OR = "or"
REDUCE_MIN = "min"
REDUCE_MAX = "max"

_REDUCE_OPS = {
    REDUCE_SUM: dist.ReduceOp.SUM,
    REDUCE_MUL: dist.ReduceOp.PRODUCT,
    REDUCE_MIN: dist.ReduceOp.MIN,
    REDUCE_MAX: dist.ReduceOp.MAX,
}
_BITWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    REDUCE_AND: torch.bitwise_and,
    REDUCE_OR: torch.bitwise_or,
}


def reduce_in_place(reduce_type: str, tensors: Sequence[Tensor], scale: float, group: Group) -> None:
    """Reduces dense tensors over ``group``, then multiplies them by ``scale``. All ranks of it together."""
    if reduce_type in _BITWISE:
        for tensor in tensors:
            _bitwise_in_place(reduce_type, tensor, group)
    elif reduce_type not in _REDUCE_OPS:
        known = ", ".join([*_REDUCE_OPS, *_BITWISE])
        raise ConfigError(f"unknown reduce_type {reduce_type!r}: it must be one of {known}.")
    elif not group.alone:
        op = _REDUCE_OPS[reduce_type]
        works = [get_backend().all_reduce(t, group.handle, op, async_op=True) for t in tensors]
        for work in works:
            if work is not None:
                work.wait()
    for tensor in tensors:
        scale_in_place(tensor, scale)


def _bitwise_in_place(reduce_type: str, tensor: Tensor, group: Group) -> None:
    if tensor.is_floating_point() or tensor.is_complex():
        raise ConfigError(
            f"reduce_type {reduce_type!r} is bitwise and needs integers or bools, not {tensor.dtype}."
        )
    # Not every process-group backend reduces bitwise (NCCL does not) or takes bools: gather, then combine.
    plain = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
    parts = stack(plain, group).unbind(0)
    tensor.copy_(functools.reduce(_BITWISE[reduce_type], parts))


def stack(value: Tensor, group: Group) -> Tensor:
    """(ranks, *value.shape): every rank's value, in the group's order."""
    value = value.contiguous()
    if group.alone:
        return value.unsqueeze(0)
    flat = value.new_empty(len(group.ranks) * value.numel())
    get_backend().all_gather(flat, value.reshape(-1), group.handle)
    return flat.view(len(group.ranks), *value.shape)


def scale_in_place(tensor: Tensor, scale: float) -> None:
    """Multiplies; costs nothing for 1."""
    if scale != 1.0:
        tensor.mul_(scale)
