"""Collectives through host memory, for several processes on PJRT's CPU device.

There every process is a world of one, and XLA's own collectives return their input without an error. Here the
recorded graph is ended, the tensor is copied to the host, gloo does the work, and the result goes back. Graphs
are cut at every collective, which on Neuron cores they are not.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm
from torch import Tensor

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Emulation:
    """Blocking collectives on copies in host memory."""

    def __init__(self) -> None:
        # A graph that is cut in the middle leaves views of tensors whose memory the rest of it would be given.
        os.environ.setdefault("XLA_ENABLE_PARAM_ALIASING", "0")

    def all_reduce(
        self, tensor: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType
    ) -> None:
        """Reduces ``tensor`` in place. Every rank of the group calls it together."""
        host = _to_host(tensor)
        dist.all_reduce(host, op=op, group=group)
        _back(host, tensor)

    def all_gather(self, output: Tensor, shard: Tensor, group: dist.ProcessGroup | None) -> None:
        """Joins every rank's ``shard`` along dimension 0 into ``output``. Every rank calls it together."""
        host = _to_host(shard)
        joined = host.new_empty(output.shape)
        all_gather_single(joined, host, group=group)
        _back(joined, output)

    def reduce_scatter(self, shard: Tensor, full: Tensor, group: dist.ProcessGroup | None) -> None:
        """Leaves this rank's slice of the sum in ``shard``. Every rank of the group calls it together."""
        host = _to_host(full)
        dist.all_reduce(host, group=group)
        _back(host.narrow(0, dist.get_rank(group) * shard.shape[0], shard.shape[0]), shard)


def _to_host(tensor: Tensor) -> Tensor:
    torch_xla.sync()
    return tensor.detach().cpu().contiguous()


def _back(host: Tensor, tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(as_data(host, tensor.device))


def as_data(host: Tensor, device: torch.device) -> Tensor:
    """``host`` on the device as an input of graphs; ``.to()`` makes a constant of a tensor of 0 or 1 without dimension."""
    (data,) = xm.send_cpu_data_to_device([host.contiguous()], device)
    tensor: Tensor = data
    return tensor
