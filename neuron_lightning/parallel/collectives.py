"""Moving activations between the ranks of a tensor-parallel group, with gradients.

The ``*_region`` functions carry NxD's names and meaning: each is an identity or a cut in one direction of
autograd and a collective in the other. Without tensor parallelism (size 1) all of them return their argument
and call nothing. The functions at the end do the same without autograd; the layers build on them.

Every rank of the tensor-parallel group must call these functions together, in the same order.

Megatron-LM (Shoeybi et al. 2019) for the tensor regions, Korthikanti et al. 2022 for the sequence regions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from neuron_lightning.backends import get_backend
from neuron_lightning.errors import ConfigError
from neuron_lightning.parallel import mesh as _mesh

__all__ = [
    "TensorParallel",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "scatter_to_sequence_parallel_region",
    "scatter_to_tensor_model_parallel_region",
    "tensor_parallel",
]


class TensorParallel(NamedTuple):
    """This rank's place in its tensor-parallel group."""

    size: int
    rank: int
    group: dist.ProcessGroup | None

    def start(self, extent: int) -> int | Tensor:
        """Where this rank's ``extent`` elements begin; a device tensor where a number would be part of a graph."""
        return get_backend().rank_as_data(self.rank) * extent


def tensor_parallel() -> TensorParallel:
    """Size, rank and process group of the tensor-parallel axis of the current mesh."""
    mesh = _mesh.current()
    size = mesh.sizes["tp"]
    return TensorParallel(size, mesh.coordinates["tp"], mesh.group("tp") if size > 1 else None)


# -- with autograd -------------------------------------------------------------------------------------


def copy_to_tensor_model_parallel_region(input_: Tensor) -> Tensor:
    """Returns ``input_`` (the same on every rank); its gradient is summed over the ranks."""
    tp = tensor_parallel()
    return input_ if tp.size == 1 else _apply(_Copy, input_, tp)


def reduce_from_tensor_model_parallel_region(input_: Tensor) -> Tensor:
    """Sums ``input_`` over the ranks; the gradient passes unchanged."""
    tp = tensor_parallel()
    return input_ if tp.size == 1 else _apply(_Reduce, input_, tp)


def scatter_to_tensor_model_parallel_region(input_: Tensor, dim: int = -1) -> Tensor:
    """This rank's slice of ``input_`` (the same on every rank) along ``dim``; gradients are gathered."""
    tp = tensor_parallel()
    return input_ if tp.size == 1 else _apply(_Scatter, input_, tp, _checked(input_, dim, tp.size))


def gather_from_tensor_model_parallel_region(input_: Tensor, dim: int = -1) -> Tensor:
    """Joins the ranks' slices along ``dim``; the gradient (the same on every rank) is cut."""
    tp = tensor_parallel()
    return input_ if tp.size == 1 else _apply(_Gather, input_, tp, dim % input_.dim(), False)


def scatter_to_sequence_parallel_region(input_: Tensor, sequence_dimension: int = 0) -> Tensor:
    """This rank's part of the sequence of ``input_`` (the same on every rank); gradients are gathered."""
    return scatter_to_tensor_model_parallel_region(input_, sequence_dimension)


def gather_from_sequence_parallel_region(
    input_: Tensor, sequence_dimension: int = 0, to_model_parallel: bool = True
) -> Tensor:
    """Joins the ranks' parts of the sequence.

    Args:
        input_: ``(seq/tp, …)``, or with the sequence at ``sequence_dimension``.
        sequence_dimension: where the sequence is.
        to_model_parallel: whether each rank goes on to use the result for its own share of the work, so that
            gradients must be summed (reduce-scatter); False where all ranks do the same with it (cut).
    """
    tp = tensor_parallel()
    dim = sequence_dimension % input_.dim()
    return input_ if tp.size == 1 else _apply(_Gather, input_, tp, dim, to_model_parallel)


def reduce_scatter_to_sequence_parallel_region(input_: Tensor, sequence_dimension: int = 0) -> Tensor:
    """Sums ``input_`` over the ranks and keeps this rank's part of the sequence; gradients are gathered."""
    tp = tensor_parallel()
    if tp.size == 1:
        return input_
    return _apply(_ReduceScatter, input_, tp, _checked(input_, sequence_dimension, tp.size))


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return result


def _checked(x: Tensor, dim: int, size: int) -> int:
    dim %= x.dim()
    if x.shape[dim] % size:
        raise ConfigError(
            f"dimension {dim} of a tensor of shape {tuple(x.shape)} cannot be cut into {size} equal parts: its "
            f"size must be a multiple of the tensor-parallel size; pad it to "
            f"{-(-x.shape[dim] // size) * size} or choose another tensor-parallel size."
        )
    return dim


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_copy(grad, ctx.tp), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        return all_reduce_copy(x, tp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, dim: int) -> Tensor:
        ctx.tp, ctx.dim = tp, dim
        return cut(x, tp, dim).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gather(grad, ctx.tp, ctx.dim), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, dim: int, sum_gradients: bool) -> Tensor:
        ctx.tp, ctx.dim, ctx.sum_gradients = tp, dim, sum_gradients
        return gather(x, tp, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.sum_gradients:
            return reduce_scatter(grad.clone(), ctx.tp, ctx.dim), None, None, None
        return cut(grad, ctx.tp, ctx.dim).contiguous(), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, dim: int) -> Tensor:
        ctx.tp, ctx.dim = tp, dim
        return reduce_scatter(x.clone(), tp, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gather(grad, ctx.tp, ctx.dim), None, None


# -- without autograd ----------------------------------------------------------------------------------


def all_reduce_copy(x: Tensor, tp: TensorParallel) -> Tensor:
    """The sum of ``x`` over the group, in a new tensor."""
    total = x.clone(memory_format=torch.contiguous_format)
    get_backend().all_reduce(total, tp.group)
    return total


def cut(x: Tensor, tp: TensorParallel, dim: int) -> Tensor:
    """This rank's slice of ``x`` along ``dim``: a view, except where graphs are recorded."""
    extent = x.shape[dim] // tp.size
    start = tp.start(extent)
    if isinstance(start, int):
        return x.narrow(dim, start, extent)
    return x.index_select(dim, start + torch.arange(extent, device=x.device))


def gather(x: Tensor, tp: TensorParallel, dim: int) -> Tensor:
    """The ranks' ``x`` joined along ``dim``."""
    return Gathering(x, tp, dim, overlap=False).result()


def reduce_scatter(x: Tensor, tp: TensorParallel, dim: int) -> Tensor:
    """This rank's slice along ``dim`` of the sum of ``x``, in its own storage. ``x`` is scratch afterwards."""
    full = _slices_first(x, tp, dim)
    shard = torch.empty_like(full[0])
    get_backend().reduce_scatter(shard, full.flatten(0, 1), tp.group)
    return shard.movedim(0, dim)


def _slices_first(x: Tensor, tp: TensorParallel, dim: int) -> Tensor:
    """``(tp, extent of one slice, …)``, contiguous, with ``dim`` moved to the front; a view for ``dim`` 0."""
    return torch.unflatten(x.movedim(_checked(x, dim, tp.size), 0), 0, (tp.size, -1)).contiguous()


class Gathering:
    """An all-gather along ``dim`` that runs while the caller computes something else.

    Args:
        x: this rank's slice.
        tp: the group.
        dim: where the slices are joined.
        overlap: False waits at once. Under ``torch.compile`` the compiler schedules, so it is always False.
    """

    def __init__(self, x: Tensor, tp: TensorParallel, dim: int, *, overlap: bool = True) -> None:
        self._dim = dim
        self._parts = x.new_empty((tp.size, *x.shape))
        output = self._parts.view(-1) if x.dim() == 0 else self._parts.flatten(0, 1)
        self._work = get_backend().all_gather(
            output, x.contiguous(), tp.group, async_op=overlap and not torch.compiler.is_compiling()
        )

    def result(self) -> Tensor:
        """Waits, and returns the joined tensor."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._parts.movedim(0, self._dim).flatten(self._dim, self._dim + 1)


class Reducing:
    """A sum over the group that runs while the caller computes something else.

    Args:
        x: this rank's summand, owned by the caller; scratch from now on.
        tp: the group.
        dim: with a dimension, only this rank's slice along it is kept (reduce-scatter); None keeps all.
        dtype: the sum is formed in this dtype if it is wider than that of ``x``, never in a narrower one.
    """

    def __init__(self, x: Tensor, tp: TensorParallel, dim: int | None, dtype: torch.dtype) -> None:
        self._dtype, self._dim = x.dtype, dim
        wide = x.to(widest(x.dtype, dtype))
        overlap = not torch.compiler.is_compiling()
        if dim is None:
            self._sum = wide.contiguous()
            self._work = get_backend().all_reduce(self._sum, tp.group, async_op=overlap)
            return
        full = _slices_first(wide, tp, dim)
        self._sum = torch.empty_like(full[0]) if get_backend().records_graphs else full[tp.rank]
        self._work = get_backend().reduce_scatter(self._sum, full.flatten(0, 1), tp.group, async_op=overlap)

    def result(self) -> Tensor:
        """Waits, and returns the sum in the dtype of the summand."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        total = self._sum if self._dim is None else self._sum.movedim(0, self._dim)
        return total.to(self._dtype)


def widest(dtype: torch.dtype, other: torch.dtype) -> torch.dtype:
    """``other`` if it is a wider floating-point type than ``dtype``, else ``dtype``."""
    return other if torch.finfo(other).bits > torch.finfo(dtype).bits else dtype
