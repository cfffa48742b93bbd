"""Gradients of sharded parameters, for those who work without the optimizer wrapper.

:class:`neuron_lightning.optim.ParallelOptimizer` does all of this itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from neuron_lightning.backends import get_backend
from neuron_lightning.errors import ConfigError
from neuron_lightning.parallel import mesh as _mesh
from neuron_lightning.parallel.collectives import tensor_parallel
from neuron_lightning.parallel.spec import get_spec

__all__ = ["allreduce_partial_grads", "clip_grad_norm"]


def clip_grad_norm(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2,
    zero1_optimizer: bool = False,
    zero1_optimizer_groups: object = None,
    force_spmd: bool = True,
) -> Tensor:
    """Clips gradients so that their global norm is at most ``max_norm``, as ``torch.nn.utils.clip_grad_norm_``.

    Each element counts once, however many tensor-parallel ranks hold it. Every rank of the tensor-parallel
    group calls it together, with the same parameters, after :func:`allreduce_partial_grads`.

    Args:
        parameters: local parameters; those without a gradient are left out.
        max_norm: largest norm that is left as it is.
        norm_type: the p of the p-norm, or ``inf``.
        zero1_optimizer: must be False: gradients that ZeRO-1 has cut over data-parallel ranks are clipped by
            their optimizer.
        zero1_optimizer_groups: must be None.
        force_spmd: accepted as NxD's; every rank runs the same program in any case.

    Returns:
        The norm before clipping, a 0-dimensional tensor on the gradients' device; fp32 (float64 for float64).
        Nothing is copied to the host.

    Raises:
        ConfigError: a ZeRO-1 argument, or a norm that does not exist.
    """
    if zero1_optimizer or zero1_optimizer_groups is not None:
        raise ConfigError(
            "clip_grad_norm works on p.grad, which a ZeRO-1 optimizer keeps in shards of its own: call "
            "optimizer.clip_grad_norm(max_norm), or set max_grad_norm in the configuration."
        )
    if not norm_type > 0 or max_norm < 0:
        raise ConfigError(
            f"norm_type must be positive and max_norm not negative, not {norm_type} and {max_norm}."
        )
    with_grad = [p for p in _list(parameters) if p.grad is not None]
    if not with_grad:
        return _over_ranks(torch.zeros((), device=_device(parameters)), norm_type)
    norm = _over_ranks(_local(with_grad, norm_type), norm_type)
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for p in with_grad:
        if p.grad is not None:
            p.grad.mul_(coefficient.to(p.grad.dtype))
    return norm


def allreduce_partial_grads(parameters: Tensor | Iterable[Tensor]) -> None:
    """Completes gradients that are partial sums: replicated KV heads, norms and biases under sequence parallel.

    Call it once per optimizer step, after the last backward. Every rank of the tensor-parallel group calls it
    together, with parameters that all have gradients or all have none. One collective per kind.

    Args:
        parameters: local parameters.
    """
    mesh = _mesh.current()
    partial: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for p in _list(parameters):
        if p.grad is None:
            continue
        row = 0
        for part in get_spec(p, mesh.sizes["tp"]).parts:
            if part.grad_ranks > 1:
                rows = p.grad.narrow(0, row, part.local_rows) if p.grad.dim() else p.grad
                partial.setdefault((part.grad_ranks, p.grad.dtype), []).append(rows)
            row += part.local_rows
    for (ranks, _), grads in sorted(partial.items(), key=lambda item: (item[0][0], str(item[0][1]))):
        flat = torch.cat([g.reshape(-1) for g in grads])
        get_backend().all_reduce(flat, mesh.tensor_subgroup(ranks))
        start = 0
        for g in grads:
            g.copy_(flat[start : start + g.numel()].view_as(g))
            start += g.numel()


def _local(parameters: list[Tensor], norm_type: float) -> Tensor:
    """This rank's share of the norm: Σ|g|^p, replicated elements shared out among their holders; or the maximum."""
    size = tensor_parallel().size
    norms, weights = [], []
    for p in parameters:
        row = 0
        for part in get_spec(p, size).parts:
            if p.grad is None:
                continue
            rows = p.grad.narrow(0, row, part.local_rows) if p.grad.dim() else p.grad
            row += part.local_rows
            wide = torch.promote_types(rows.dtype, torch.float32)
            norms.append(torch.linalg.vector_norm(rows, norm_type, dtype=wide))
            weights.append(1.0 / part.replicas)
    device = norms[0].device
    stacked = torch.stack([n.to(device) for n in norms])
    if math.isinf(norm_type):
        return stacked.max()
    return (stacked.pow(norm_type) * torch.tensor(weights, dtype=stacked.dtype, device=device)).sum()


def _over_ranks(share: Tensor, norm_type: float) -> Tensor:
    tp = tensor_parallel()
    if tp.size > 1:
        op = dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM
        get_backend().all_reduce(share, tp.group, op=op)
    return share if math.isinf(norm_type) else share.pow(1.0 / norm_type)


def _list(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    unique = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    return list({id(p): p for p in unique}.values())


def _device(parameters: Tensor | Iterable[Tensor]) -> torch.device:
    return next((p.device for p in _list(parameters)), torch.device("cpu"))
