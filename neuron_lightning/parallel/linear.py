"""The two matrix products of tensor parallelism, with their communication hidden behind arithmetic.

Both are autograd functions because the order of what happens in the backward pass matters: the collective of
the input gradient runs while the weight gradient is computed, and under sequence parallel a layer keeps only
its own part of the sequence and gathers the rest again (Korthikanti et al. 2022, section 4.2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from neuron_lightning.parallel.collectives import (
    Gathering,
    Reducing,
    TensorParallel,
    gather,
    reduce_scatter,
    widest,
)


class Communication(NamedTuple):
    """How a parallel product exchanges activations.

    Attributes:
        tp: the tensor-parallel group, of at least two ranks.
        sequence_dim: the dimension along which activations outside are sharded; None: they are whole.
        reduce_dtype: sums over ranks are formed in this dtype where it is wider than the activations'.
        padding: (start, length) runs of the sharded weight dimension whose gradient is kept at zero.
        reduce_output: row product only: False leaves the partial sums as they are.
    """

    tp: TensorParallel
    sequence_dim: int | None
    reduce_dtype: torch.dtype
    padding: tuple[tuple[int, int], ...] = ()
    reduce_output: bool = True


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, how: Communication) -> Tensor:
    """``F.linear`` with a weight sharded by rows: each rank computes its slice of the output features.

    Args:
        x: ``(…, in)``, the same on every rank; with a sequence dimension, this rank's part of the sequence.
        weight: ``(out/tp, in)``.
        bias: ``(out/tp,)`` or None.
        how: group, sequence dimension, dtype of sums, padding.

    Returns:
        ``(…, out/tp)`` over the whole sequence. Every rank of the group calls it together.
    """
    result: Tensor = _ColumnLinear.apply(*_autocast(x, weight, bias), how)  # type: ignore[no-untyped-call]
    return result


def row_linear(x: Tensor, weight: Tensor, how: Communication) -> Tensor:
    """``F.linear`` with a weight sharded by columns: the ranks' partial sums are added up.

    Args:
        x: ``(…, in/tp)``, this rank's slice of the features, over the whole sequence.
        weight: ``(out, in/tp)``.
        how: group, sequence dimension, dtype of sums, padding.

    Returns:
        ``(…, out)``, the same on every rank; with a sequence dimension, this rank's part of the sequence.
        Every rank of the group calls it together.
    """
    x, weight, _ = _autocast(x, weight, None)
    result: Tensor = _RowLinear.apply(x, weight, how)  # type: ignore[no-untyped-call]
    return result


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts as ``F.linear`` would under ``torch.autocast``, outside the function, so gradients cast back."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(t: Tensor) -> Tensor:
        return t if t.dtype == torch.float64 else t.to(dtype)

    return cast(x), cast(weight), None if bias is None else cast(bias)


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: Communication) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(x, weight)
        full = x if how.sequence_dim is None else gather(x, how.tp, how.sequence_dim)
        return F.linear(full, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        how: Communication = ctx.how
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        gathering = None
        if needs_weight and how.sequence_dim is not None:
            gathering = Gathering(x, how.tp, how.sequence_dim)
        reducing = None
        if needs_x:
            reducing = Reducing(grad.matmul(weight), how.tp, how.sequence_dim, how.reduce_dtype)
        grad_weight = grad_bias = None
        if needs_weight:
            grad_weight = _weight_gradient(grad, x if gathering is None else gathering.result())
            _zero(grad_weight, 0, how.padding)
        if needs_bias:
            grad_bias = grad.flatten(0, -2).sum(0)
            _zero(grad_bias, 0, how.padding)
        return None if reducing is None else reducing.result(), grad_weight, grad_bias, None


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, how: Communication) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(x, weight)
        partial = F.linear(x, weight)
        if not how.reduce_output:
            return partial
        if how.sequence_dim is None:
            return Reducing(partial, how.tp, None, how.reduce_dtype).result()
        wide = partial.to(widest(partial.dtype, how.reduce_dtype))
        return reduce_scatter(wide, how.tp, how.sequence_dim).to(partial.dtype).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        how: Communication = ctx.how
        if how.sequence_dim is not None and how.reduce_output:
            grad = gather(grad, how.tp, how.sequence_dim)
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_weight = None
        if needs_weight:
            grad_weight = _weight_gradient(grad, x)
            _zero(grad_weight, 1, how.padding)
        return grad.matmul(weight) if needs_x else None, grad_weight, None


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """``(out, in)`` from ``grad (…, out)`` and ``x (…, in)``."""
    return grad.reshape(-1, grad.shape[-1]).t().matmul(x.reshape(-1, x.shape[-1]))


def _zero(grad: Tensor, dim: int, runs: tuple[tuple[int, int], ...]) -> None:
    for start, length in runs:
        grad.narrow(dim, start, length).zero_()
