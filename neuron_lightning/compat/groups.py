"""Groups as scripts written for torch_xla give them: lists of rank lists, process groups, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from neuron_lightning.errors import ParallelStateError
from neuron_lightning.parallel import mesh

Groups = Sequence[Sequence[int]] | dist.ProcessGroup | None


@dataclass(frozen=True, kw_only=True)
class Group:
    """The ranks that this process communicates with, in order.

    Attributes:
        handle: what torch.distributed takes; None for all ranks.
        ranks: global ranks, in the group's order.
    """

    handle: dist.ProcessGroup | None
    ranks: tuple[int, ...]

    @property
    def alone(self) -> bool:
        """Whether there is nobody to communicate with."""
        return len(self.ranks) == 1


def resolve(groups: Groups) -> Group:
    """The group that ``groups`` means on this rank.

    Args:
        groups: None or an empty list (all ranks), a process group, or the rank lists of all groups of one kind,
            as ``parallel_state.get_data_parallel_group(as_list=True)`` returns them.

    Raises:
        ParallelStateError: no existing group consists of these ranks; the message names those that exist.
    """
    if not dist.is_initialized():
        return _without_processes(groups)
    world = tuple(range(dist.get_world_size()))
    if isinstance(groups, dist.ProcessGroup):
        return Group(handle=groups, ranks=tuple(dist.get_process_group_ranks(groups)))
    if groups is None or (isinstance(groups, Sequence) and not groups):
        return Group(handle=None, ranks=world)
    wanted = _as_ranks(groups)
    rank = dist.get_rank()
    if wanted == {(r,) for r in world}:
        return Group(handle=None, ranks=(rank,))
    if wanted == {world}:
        return Group(handle=None, ranks=world)
    for axis, existing in _axes().items():
        if wanted == existing:
            mine = next(ranks for ranks in existing if rank in ranks)
            return Group(handle=mesh.current().group(axis), ranks=mine)
    raise ParallelStateError(_unknown(groups, world))


def _without_processes(groups: Groups) -> Group:
    if groups is None or (isinstance(groups, Sequence) and (not groups or _as_ranks(groups) == {(0,)})):
        return Group(handle=None, ranks=(0,))
    raise ParallelStateError(_unknown(groups, (0,)))


def _as_ranks(groups: Any) -> set[tuple[int, ...]]:
    if isinstance(groups, Sequence) and all(
        isinstance(ranks, Sequence) and all(isinstance(rank, int) for rank in ranks) for ranks in groups
    ):
        return {tuple(ranks) for ranks in groups}
    raise ParallelStateError(
        f"groups must be a list of rank lists, a process group or None, not {groups!r}; "
        "see parallel_state.get_data_parallel_group(as_list=True)."
    )


def _axes() -> dict[str, set[tuple[int, ...]]]:
    if not mesh.is_initialized():
        return {}
    current = mesh.current()
    return {axis: {tuple(ranks) for ranks in current.replica_groups(axis)} for axis in reversed(mesh.AXES)}


def _unknown(groups: Any, world: tuple[int, ...]) -> str:
    known = {"world": {world}} | {
        axis: ranks for axis, ranks in _axes().items() if len(next(iter(ranks))) > 1
    }
    names = "; ".join(f"{name} {sorted(map(list, ranks))}" for name, ranks in known.items())
    missing = "" if mesh.is_initialized() else " (no parallel layout is initialised)"
    return (
        f"no group has the ranks {groups!r}: the groups that exist are {names}{missing}. Pass one of them, in "
        "this order of ranks, or a process group made by torch.distributed.new_group."
    )
