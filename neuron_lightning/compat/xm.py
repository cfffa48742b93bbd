"""``torch_xla.core.xla_model`` for every device: the functions that NxD's scripts call.

Signatures and meanings are torch_xla's. Collectives give what torch.distributed gives over the same ranks, and
are not differentiable, as there. Every rank of a group calls a collective together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO, overload

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer

from neuron_lightning.backends import get_backend
from neuron_lightning.compat.closures import StepClosures
from neuron_lightning.compat.groups import Groups, resolve
from neuron_lightning.compat.reduction import (
    REDUCE_AND,
    REDUCE_MAX,
    REDUCE_MIN,
    REDUCE_MUL,
    REDUCE_OR,
    REDUCE_SUM,
    reduce_in_place,
    scale_in_place,
    stack,
)
from neuron_lightning.errors import ConfigError, ParallelStateError
from neuron_lightning.lightning.launch import detect
from neuron_lightning.optim import ParallelOptimizer
from neuron_lightning.parallel import parallel_state

__all__ = [
    "REDUCE_AND",
    "REDUCE_MAX",
    "REDUCE_MIN",
    "REDUCE_MUL",
    "REDUCE_OR",
    "REDUCE_SUM",
    "add_step_closure",
    "all_gather",
    "all_reduce",
    "get_local_ordinal",
    "get_ordinal",
    "get_rng_state",
    "is_master_ordinal",
    "mark_step",
    "master_print",
    "mesh_reduce",
    "optimizer_step",
    "reduce_scatter",
    "rendezvous",
    "save",
    "set_rng_state",
    "xla_device",
    "xrt_world_size",
]

_closures = StepClosures()


def xla_device(n: int | None = None, devkind: str | None = None) -> torch.device:
    """The current device of this process, or its ``n``-th.

    Args:
        n: index; None for the device that the strategy made current.
        devkind: a device type; an error if it is not that of the backend in use.
    """
    backend = get_backend()
    if devkind is not None and devkind.lower() not in (backend.name, backend.device_type):
        raise ConfigError(f"devkind is {devkind!r}, but this process runs on {backend.name}; leave it None.")
    return backend.device(n) if n is not None else torch.empty(0, device=backend.device_type).device


def get_ordinal(defval: int = 0) -> int:
    """Global rank; before the process group exists, the launcher's; ``defval`` in a single process."""
    if dist.is_initialized():
        return dist.get_rank()
    launch = detect()
    return defval if launch is None else launch.rank


def get_local_ordinal(defval: int = 0) -> int:
    """Rank on this node; ``defval`` in a single process."""
    launch = detect()
    return dist.get_node_local_rank(fallback_rank=defval) if launch is None else launch.local_rank


def is_master_ordinal(local: bool = True) -> bool:
    """Whether this is rank 0 of its node (``local``), or of all."""
    return (get_local_ordinal() if local else get_ordinal()) == 0


def xrt_world_size(defval: int = 1) -> int:
    """Number of ranks; before the process group exists, the launcher's; ``defval`` in a single process."""
    if dist.is_initialized():
        return dist.get_world_size()
    launch = detect()
    return defval if launch is None else launch.world_size


@overload
def all_reduce(
    reduce_type: str, inputs: Tensor, scale: float = 1.0, groups: Groups = None, pin_layout: bool = True
) -> Tensor: ...
@overload
def all_reduce(
    reduce_type: str,
    inputs: Sequence[Tensor],
    scale: float = 1.0,
    groups: Groups = None,
    pin_layout: bool = True,
) -> None: ...
@torch.no_grad()
def all_reduce(
    reduce_type: str,
    inputs: Tensor | Sequence[Tensor],
    scale: float = 1.0,
    groups: Groups = None,
    pin_layout: bool = True,
) -> Tensor | None:
    """Reduces over a group: a tensor gives a new tensor, a list is reduced in place (and gives None).

    Args:
        reduce_type: one of the ``REDUCE_*`` names; ``and`` and ``or`` are bitwise, on integers and bools.
        inputs: tensor or tensors, any shape, equal over the group.
        scale: factor on the result.
        groups: rank lists, a process group, or None for all ranks; see :func:`.groups.resolve`.
        pin_layout: layouts are always pinned: there are none but strided ones.

    Raises:
        ParallelStateError: no such group exists.
        ConfigError: unknown ``reduce_type``, or one that the dtype does not have.
    """
    group = resolve(groups)
    if isinstance(inputs, Tensor):
        result = inputs.detach().clone(memory_format=torch.contiguous_format)
        reduce_in_place(reduce_type, [result], scale, group)
        return result
    dense = [t.detach() if t.is_contiguous() else t.detach().contiguous() for t in inputs]
    reduce_in_place(reduce_type, dense, scale, group)
    for target, source in zip(inputs, dense, strict=True):
        if not target.is_contiguous():
            target.copy_(source)
    return None


@torch.no_grad()
def all_gather(
    value: Tensor, dim: int = 0, groups: Groups = None, output: Tensor | None = None, pin_layout: bool = True
) -> Tensor:
    """Concatenates every rank's ``value`` along ``dim``, in the group's order.

    Args:
        value: at least one dimension; shapes equal over the group.
        dim: dimension of the concatenation.
        groups: as for :func:`all_reduce`.
        output: filled and returned, if given.
        pin_layout: as for :func:`all_reduce`.
    """
    group = resolve(groups)
    stacked = stack(value.detach(), group)
    gathered = torch.cat(stacked.unbind(0), dim=dim)
    return gathered if output is None else output.copy_(gathered)


@torch.no_grad()
def reduce_scatter(
    reduce_type: str,
    input: Tensor,
    scale: float,
    scatter_dim: int,
    shard_count: int,
    groups: Groups = None,
    output: Tensor | None = None,
    pin_layout: bool = True,
) -> Tensor:
    """Reduces ``input`` over a group and keeps this rank's slice of ``scatter_dim``.

    Args:
        reduce_type: as for :func:`all_reduce`.
        input: its ``scatter_dim`` is a multiple of ``shard_count``.
        scale: factor on the result.
        scatter_dim: dimension that is cut.
        shard_count: number of slices: the size of the group.
        groups: as for :func:`all_reduce`.
        output: filled and returned, if given.
        pin_layout: as for :func:`all_reduce`.
    """
    group = resolve(groups)
    size = input.shape[scatter_dim]
    if shard_count != len(group.ranks) or size % shard_count:
        raise ConfigError(
            f"reduce_scatter: shard_count must be the group's size and divide dimension {scatter_dim}, but "
            f"shard_count is {shard_count}, the group has {len(group.ranks)} ranks, the dimension {size} elements."
        )
    full = input.detach().movedim(scatter_dim, 0).clone(memory_format=torch.contiguous_format)
    mine = full.narrow(0, group.ranks.index(get_ordinal()) * (size // shard_count), size // shard_count)
    if reduce_type == REDUCE_SUM and not group.alone:
        get_backend().reduce_scatter(mine, full, group.handle)
        scale_in_place(mine, scale)
    else:
        reduce_in_place(reduce_type, [full], scale, group)
    result = mine.movedim(0, scatter_dim).contiguous()
    return result if output is None else output.copy_(result)


def rendezvous(tag: str, payload: bytes = b"", replicas: Sequence[int] = ()) -> list[bytes]:
    """Waits for all ranks at the same ``tag``; returns every rank's ``payload``, in rank order.

    Raises:
        ParallelStateError: ranks met at different tags, or only some of the ranks are asked for.
    """
    if replicas and sorted(replicas) != list(range(xrt_world_size())):
        raise ParallelStateError(
            f"rendezvous {tag!r}: replicas must be empty or all {xrt_world_size()} ranks, not {list(replicas)}."
        )
    if not dist.is_initialized():
        return [payload]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (tag, payload))
    tags = {f"rank {rank} at {their!r}" for rank, (their, _) in enumerate(everyone) if their != tag}
    if tags:
        raise ParallelStateError(f"rendezvous: this rank is at {tag!r}, but {', '.join(sorted(tags))}.")
    return [data for _, data in everyone]


def mesh_reduce(tag: str, data: Any, reduce_fn: Callable[[list[Any]], Any]) -> Any:
    """``reduce_fn`` of the list of every rank's ``data`` (any picklable object), in rank order."""
    if not dist.is_initialized():
        return reduce_fn([data])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, _to_host(data))
    return reduce_fn(everyone)


def mark_step(wait: bool = False, reset_scope: bool = True) -> None:
    """Ends the step: the device's recorded graph, if it records one, then the step's closures.

    Args:
        wait: also wait for the device and for closures in the background.
        reset_scope: torch_xla's debugging scopes; there are none here.
    """
    get_backend().mark_step()
    _closures.run()
    if wait:
        get_backend().synchronize()
        _closures.wait()


def add_step_closure(closure: Callable[..., Any], args: Sequence[Any] = (), run_async: bool = False) -> None:
    """Calls ``closure(*args)`` at the next :func:`mark_step`, on a background thread if ``run_async``.

    In the background, closures run one after another on copies of their tensor arguments; an error there is
    raised by a later :func:`mark_step`.
    """
    _closures.add(closure, args, run_async)


def optimizer_step(
    optimizer: Optimizer,
    barrier: bool = False,
    optimizer_args: Mapping[str, Any] | None = None,
    groups: Groups = None,
    pin_layout: bool = True,
) -> Any:
    """Averages gradients over ``groups`` and steps; with ``barrier`` ends the step too.

    A :class:`~neuron_lightning.optim.ParallelOptimizer` reduces gradients itself, over the data-parallel group.

    Args:
        optimizer: any torch optimizer.
        barrier: call :func:`mark_step` afterwards.
        optimizer_args: keywords of ``optimizer.step``.
        groups: as for :func:`all_reduce`; for a ParallelOptimizer, None or the data-parallel groups.
        pin_layout: as for :func:`all_reduce`.

    Returns:
        What ``optimizer.step`` returned.
    """
    if isinstance(optimizer, ParallelOptimizer):
        if groups is not None and resolve(groups).ranks != _data_parallel_ranks():
            raise ParallelStateError(
                f"this optimizer reduces gradients over the data-parallel ranks {list(_data_parallel_ranks())}, but "
                f"groups are {groups!r}; leave groups out."
            )
    else:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        all_reduce(REDUCE_SUM, gradients, 1.0 / len(resolve(groups).ranks), groups)
    loss = optimizer.step(**(optimizer_args or {}))
    if barrier:
        mark_step()
    return loss


def master_print(*args: Any, fd: TextIO | None = None, local: bool = False, flush: bool = False) -> None:
    """Prints on rank 0 (with ``local``: of each node) only."""
    if is_master_ordinal(local=local):
        stream = sys.stdout if fd is None else fd
        stream.write(" ".join(map(str, args)) + "\n")
        if flush:
            stream.flush()


def save(data: Any, file_or_path: Any, master_only: bool = True, global_master: bool = False) -> None:
    """``torch.save`` of ``data`` with its tensors moved to the host.

    Args:
        data: any object; tensors in dicts, lists and tuples are moved.
        file_or_path: as for ``torch.save``.
        master_only: write on one rank per node only; else on every rank (to different paths).
        global_master: with ``master_only``, write on global rank 0 only.
    """
    if not master_only or is_master_ordinal(local=not global_master):
        torch.save(_to_host(data), file_or_path)


def get_rng_state(device: Any = None) -> Tensor:
    """State of the device's default generator, a CPU byte tensor (torch_xla: an integer seed)."""
    return get_backend().get_rng_state()


def set_rng_state(seed: int | Tensor, device: Any = None) -> None:
    """Seeds the generators with an integer, or restores what :func:`get_rng_state` returned."""
    if isinstance(seed, Tensor):
        get_backend().set_rng_state(seed)
    else:
        torch.manual_seed(seed)


def _data_parallel_ranks() -> tuple[int, ...]:
    return resolve(parallel_state.get_data_parallel_group(as_list=True)).ranks


def _to_host(data: Any) -> Any:
    held: list[Tensor] = []
    apply_to_collection(data, Tensor, held.append)
    copies = iter(get_backend().to_host(held))  # one transfer for all
    return apply_to_collection(data, Tensor, lambda _: next(copies))
