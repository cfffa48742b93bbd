"""What differs between devices, and nothing else.

A :class:`Backend` is everything that the rest of the package asks of a device: making it current, creating
process groups on it, the three collectives that sharded training needs, step boundaries, autocast, random
state and a few facts. Everything above speaks plain PyTorch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neuron_lightning.backends.counts import Counts


class Backend(ABC):
    """One kind of device and the way it communicates.

    Attributes:
        name: ``cpu``, ``cuda``, ``neuron`` or ``xla``.
        device_type: the ``torch.device`` type, e.g. ``cpu``.
        process_group_backend: what :func:`torch.distributed.init_process_group` is given. Its default group
            always serves CPU tensors too, so that flags and objects travel without touching the device.
        mesh_device_type: what :class:`~torch.distributed.device_mesh.DeviceMesh` is given.
        supports_float64: whether 64-bit floating point is computed natively.
        records_graphs: whether operators are recorded and run later, as one graph (``xla``). Then tensors that
            share memory with others cost a copy each, and numbers that change belong into tensors.
    """

    name: str
    device_type: str
    process_group_backend: str
    mesh_device_type: str
    supports_float64: bool
    records_graphs: bool = False

    @property
    def is_trial(self) -> bool:
        """Whether this run only collects graphs for the compiler: nothing is computed, losses mean nothing."""
        return False

    # -- devices ---------------------------------------------------------------------------------------

    @abstractmethod
    def adopt_process(self) -> None:
        """What has to be set once in a process that uses this backend; called when it becomes the current one."""

    @abstractmethod
    def is_available(self) -> bool:
        """Whether this machine has such a device that works."""

    @abstractmethod
    def device_count(self) -> int:
        """Number of devices that this process can see (for ``cpu``: 1)."""

    @abstractmethod
    def device(self, local_rank: int) -> torch.device:
        """The device of the process with this rank on its node."""

    @abstractmethod
    def set_device(self, device: torch.device) -> None:
        """Makes ``device`` the current one of this process."""

    @abstractmethod
    def current_device(self) -> torch.device:
        """The device that :meth:`set_device` made current."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Returns cached, unused device memory to the system."""

    @abstractmethod
    def memory_stats(self, device: torch.device) -> dict[str, float]:
        """Memory figures in bytes, by name; at least ``allocated`` and ``peak_allocated`` where known."""

    @abstractmethod
    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Dense peak FLOP/s of one device for ``dtype``, or None where no figure is published."""

    # -- distributed -----------------------------------------------------------------------------------

    @abstractmethod
    def init_process_group(self, *, rank: int, world_size: int, timeout: timedelta) -> None:
        """Creates the default process group from the ``MASTER_*`` environment. Every rank calls it together."""

    @abstractmethod
    def destroy_process_group(self) -> None:
        """Destroys every process group, in such a way that the process may exit right after."""

    @abstractmethod
    def all_reduce(
        self,
        tensor: Tensor,
        group: dist.ProcessGroup | None,
        op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Reduces ``tensor`` in place over ``group``. Every rank of the group calls it together."""

    @abstractmethod
    def all_gather(
        self, output: Tensor, shard: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
    ) -> dist.Work | None:
        """Concatenates every rank's ``shard`` along dimension 0 into ``output`` (shard may be a view of it).

        Both must be contiguous. Every rank of the group calls it together.
        """

    @abstractmethod
    def reduce_scatter(
        self, shard: Tensor, full: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
    ) -> dist.Work | None:
        """Sums ``full`` over ``group`` and leaves this rank's slice of dimension 0 in ``shard``.

        ``full`` is used as scratch space and is undefined afterwards (``shard`` may be a view of it, and
        with ``async_op`` must be: this rank's own slice). Both must be contiguous. Every rank of the group
        calls it together.
        """

    def adopt_group(self, group: dist.ProcessGroup | None, everyone: Sequence[Sequence[int]]) -> None:  # noqa: B027
        """Hears of a group of the layout, and of the ranks of all groups of its kind. Most backends need not."""

    def broadcast(self, tensor: Tensor, source: int, group: dist.ProcessGroup | None) -> None:
        """Overwrites ``tensor`` with that of global rank ``source``. Every rank of the group calls it together."""
        dist.broadcast(tensor, src=source, group=group)

    def rank_as_data(self, rank: int) -> int | Tensor:
        """A number that differs by rank, in a form that leaves the ranks' recorded graphs equal."""
        return rank

    # -- steps, precision, randomness ------------------------------------------------------------------

    @abstractmethod
    def mark_step(self) -> None:
        """Ends the current lazily recorded graph; nothing to do on eager devices."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until all work queued on the device is done."""

    def scalar(self, value: float, like: Tensor) -> Tensor:
        """``value`` as a 0-d tensor of the dtype and on the device of ``like``, never a constant of a graph."""
        return torch.tensor(value, dtype=like.dtype, device=like.device)

    @abstractmethod
    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[Any]:
        """Context in which eligible operators compute in ``dtype`` (always passed explicitly)."""

    @abstractmethod
    def compile(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``torch.compile`` with this device's compiler and static shapes."""

    @abstractmethod
    def get_rng_state(self) -> Tensor:
        """State of the device's default generator, as a CPU byte tensor."""

    @abstractmethod
    def set_rng_state(self, state: Tensor) -> None:
        """Restores what :meth:`get_rng_state` returned."""

    @abstractmethod
    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies tensors to host memory in one go (one synchronisation for all of them)."""

    def graph_counts(self) -> Counts:
        """What this process has compiled and read so far; all zero where nothing is counted."""
        return Counts()
