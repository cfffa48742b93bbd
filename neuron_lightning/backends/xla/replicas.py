"""XLA's own collectives, which are part of the recorded graph.

A collective of a graph names the replicas of *all* its groups, so that every process records the same graph. A
process group of torch.distributed knows its own ranks only; so the groups of a layout are made known here, all
of a kind at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch_xla.core.xla_model as xm
from torch import Tensor

from neuron_lightning.errors import ParallelStateError

_NAMES = {
    dist.ReduceOp.SUM: xm.REDUCE_SUM,
    dist.ReduceOp.PRODUCT: xm.REDUCE_MUL,
    dist.ReduceOp.MIN: xm.REDUCE_MIN,
    dist.ReduceOp.MAX: xm.REDUCE_MAX,
}


class Replicas:
    """Collectives over replica groups. Layouts are left to the compiler everywhere (``pin_layout=False``)."""

    def __init__(self) -> None:
        self._everyone: dict[tuple[int, ...], list[list[int]]] = {}

    def adopt(self, group: dist.ProcessGroup, everyone: Sequence[Sequence[int]]) -> None:
        """Makes known that ``everyone`` are the ranks of all groups of the kind of ``group``."""
        for ranks in everyone:
            self._everyone[tuple(ranks)] = [list(others) for others in everyone]
        self._of(group)

    def all_reduce(
        self, tensor: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType
    ) -> None:
        """Reduces ``tensor`` in place. Every rank of the group calls it together."""
        reduced = xm.all_reduce(_name(op), tensor.detach(), groups=self._of(group), pin_layout=False)
        with torch.no_grad():
            tensor.copy_(reduced)

    def all_gather(self, output: Tensor, shard: Tensor, group: dist.ProcessGroup | None) -> None:
        """Joins every rank's ``shard`` along dimension 0 into ``output``. Every rank calls it together."""
        joined = xm.all_gather(shard.detach(), dim=0, groups=self._of(group), pin_layout=False)
        with torch.no_grad():
            output.copy_(joined)

    def reduce_scatter(self, shard: Tensor, full: Tensor, group: dist.ProcessGroup | None) -> None:
        """Leaves this rank's slice of the sum in ``shard``. Every rank of the group calls it together."""
        groups = self._of(group)
        mine = xm.reduce_scatter(
            xm.REDUCE_SUM,
            full.detach(),
            scale=1.0,
            scatter_dim=0,
            shard_count=len(groups[0]),
            groups=groups,
            pin_layout=False,
        )
        with torch.no_grad():
            shard.copy_(mine)

    def _of(self, group: dist.ProcessGroup | None) -> list[list[int]]:
        ranks = tuple(dist.get_process_group_ranks(dist.group.WORLD if group is None else group))
        if len(ranks) == dist.get_world_size():
            return [list(ranks)]
        if ranks not in self._everyone:
            raise ParallelStateError(
                f"XLA's collectives must know all groups of a kind, so that every rank records the same graph, and the "
                f"group of ranks {list(ranks)} is not one of the layout's "
                f"({sorted(map(list, self._everyone))}): use a group of parallel_state, or one of all ranks."
            )
        return self._everyone[ranks]


def _name(op: dist.ReduceOp.RedOpType) -> str:
    name = _NAMES.get(op)
    if name is None:
        raise ParallelStateError(
            f"XLA has no reduction {op}: use one of {', '.join(str(known) for known in _NAMES)}."
        )
    return str(name)
