"""What a rank's parameter is a part of: the one description that gradients, norms and checkpoints share.

A layer attaches a :class:`ShardSpec` to every parameter whose local tensor is not simply a full copy. The
optimizer reads from it which gradients are partial sums and which elements several ranks hold; the
checkpoint reads which boxes of which global tensors the rank holds. A parameter without a spec is a full
copy, the same on every rank of its tensor-parallel group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

_ATTRIBUTE = "shard_spec"


@dataclass(frozen=True, kw_only=True)
class ShardPart:
    """A run of whole rows (dimension 0) of a local parameter: one box of one global tensor.

    Attributes:
        name: canonical leaf name that takes the place of the parameter's own (``weight_q`` for the first
            rows of ``weight_qkv``); empty: its own name.
        global_shape: shape of the unfused, unpadded global tensor.
        global_offset: where the box starts in it.
        shape: extent of the box; may hold no element (a rank that has only padding).
        local_offset: where the box starts in the local parameter.
        local_rows: rows of the local parameter that belong to this part, padding included.
        replicas: ranks of the tensor-parallel group that hold this same box.
        grad_ranks: consecutive tensor-parallel ranks over which the gradient that autograd leaves here must
            still be summed (1: it is complete). Replicated KV heads: ``replicas``. Sequence-parallel norms:
            the tensor-parallel size.
    """

    name: str = ""
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    shape: tuple[int, ...]
    local_offset: tuple[int, ...]
    local_rows: int
    replicas: int = 1
    grad_ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """The parts of one local parameter, in order of its rows; together they cover all of them."""

    parts: tuple[ShardPart, ...]


def set_spec(param: nn.Parameter, spec: ShardSpec) -> None:
    """Attaches ``spec`` to ``param``."""
    setattr(param, _ATTRIBUTE, spec)


def get_spec(param: torch.Tensor, tp_size: int) -> ShardSpec:
    """The spec of ``param``; for one that has none, a full copy on each of ``tp_size`` ranks.

    Under sequence parallel a layer marks replicated parameters that see only a slice of the sequence with
    NxD's attribute ``sequence_parallel_enabled``: their gradients are summed over the group.
    """
    spec = getattr(param, _ATTRIBUTE, None)
    if isinstance(spec, ShardSpec):
        return spec
    shape = tuple(param.shape)
    return ShardSpec(
        parts=(
            ShardPart(
                global_shape=shape,
                global_offset=(0,) * len(shape),
                shape=shape,
                local_offset=(0,) * len(shape),
                local_rows=shape[0] if shape else 1,
                replicas=tp_size,
                grad_ranks=tp_size if getattr(param, "sequence_parallel_enabled", False) else 1,
            ),
        )
    )


def row_numel(param: torch.Tensor) -> int:
    """Elements of one row (dimension 0) of ``param``."""
    return math.prod(param.shape[1:])
