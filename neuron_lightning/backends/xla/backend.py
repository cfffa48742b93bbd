"""The backend on torch-xla: operators are recorded, and run as one compiled graph where a step is marked.

Three rules keep the number of graphs small: a value that changes from step to step reaches the device as data,
never as a number in the graph (:meth:`XLABackend.scalar`); what is read on the host is read after a graph has
ended (:meth:`XLABackend.to_host`); every process records the same graph.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from torch import Tensor

from neuron_lightning.backends.base import Backend
from neuron_lightning.backends.counts import Counts
from neuron_lightning.backends.host_group import settle_and_destroy
from neuron_lightning.backends.host_memory import host_memory
from neuron_lightning.backends.xla import graphs
from neuron_lightning.backends.xla.emulation import Emulation, all_gather_single, as_data
from neuron_lightning.backends.xla.replicas import Replicas
from neuron_lightning.errors import ParallelStateError

_log = logging.getLogger(__name__)

NEURON = "NEURON"
_SEED_BYTES = 8
_TRIAL = "NEURON_EXTRACT_GRAPHS_ONLY"
"""Set by ``neuron_parallel_compile`` in its trial run, whose results are not computed."""

# Dense bf16 of one NeuronCore-v2: 190 TFLOP/s a trn1 chip of two cores (AWS, Trainium architecture).
_PEAK_FLOPS = {NEURON: {torch.bfloat16: 95e12}}


class XLABackend(Backend):
    """torch-xla on PJRT: Neuron cores (``PJRT_DEVICE=NEURON``), or the CPU for tests.

    One process drives one device. Device tensors travel by XLA's own collectives, flags and objects by gloo. On
    PJRT's CPU device, where several processes have no collectives, they are emulated through the host, which
    is said in the log.
    """

    name = "xla"
    device_type = "xla"
    process_group_backend = "gloo"
    mesh_device_type = "cpu"
    supports_float64 = False
    records_graphs = True

    def __init__(self) -> None:
        self._collectives: Emulation | Replicas | None = None
        self._ranks: dict[int, Tensor] = {}

    @property
    def hardware(self) -> str:
        """PJRT's name of the device: ``NEURON`` or ``CPU``."""
        return str(xr.device_type())

    @property
    def is_trial(self) -> bool:
        return os.environ.get(_TRIAL, "") not in ("", "0")

    # -- devices ---------------------------------------------------------------------------------------

    def adopt_process(self) -> None:
        """Nothing: torch-xla prepares the process when it is imported."""

    def is_available(self) -> bool:
        return bool(torch_xla.device().type == self.device_type)

    def device_count(self) -> int:
        return int(xr.addressable_device_count())

    def device(self, local_rank: int) -> torch.device:
        """The one device of this process, whatever its rank."""
        device: torch.device = torch_xla.device()
        return device

    def set_device(self, device: torch.device) -> None:
        """Nothing: a process has one."""

    def current_device(self) -> torch.device:
        return self.device(0)

    def empty_cache(self) -> None:
        """Nothing: the runtime keeps no cache of its own."""

    def memory_stats(self, device: torch.device) -> dict[str, float]:
        if self.hardware == "CPU":
            return host_memory()
        used = xm.get_memory_info(str(device))
        return {"allocated": float(used["bytes_used"]), "peak_allocated": float(used["peak_bytes_used"])}

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        return _PEAK_FLOPS.get(self.hardware, {}).get(dtype)

    # -- distributed -----------------------------------------------------------------------------------

    def init_process_group(self, *, rank: int, world_size: int, timeout: timedelta) -> None:
        """As declared, on gloo.

        Raises:
            ParallelStateError: XLA's world has another size, so that its collectives would be wrong without a word.
        """
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timeout)
        self._collectives = self._choose_collectives()

    def destroy_process_group(self) -> None:
        self._collectives = None
        settle_and_destroy()

    def adopt_group(self, group: dist.ProcessGroup | None, everyone: Sequence[Sequence[int]]) -> None:
        if isinstance(self._communication, Replicas) and group is not None:
            self._communication.adopt(group, everyone)

    def all_reduce(
        self,
        tensor: Tensor,
        group: dist.ProcessGroup | None,
        op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
        async_op: bool = False,
    ) -> dist.Work | None:
        if tensor.device.type == "cpu":
            return dist.all_reduce(tensor, op=op, group=group, async_op=async_op)  # type: ignore[no-any-return]
        self._communication.all_reduce(tensor, group, op)
        return None

    def all_gather(
        self, output: Tensor, shard: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
    ) -> dist.Work | None:
        if shard.device.type == "cpu":
            return all_gather_single(output, shard, group=group, async_op=async_op)  # type: ignore[no-any-return]
        self._communication.all_gather(output, shard, group)
        return None

    def reduce_scatter(
        self, shard: Tensor, full: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
    ) -> dist.Work | None:
        if full.device.type == "cpu":
            dist.all_reduce(full, group=group)
            shard.copy_(full.narrow(0, dist.get_rank(group) * shard.shape[0], shard.shape[0]))
        else:
            self._communication.reduce_scatter(shard, full, group)
        return None

    def broadcast(self, tensor: Tensor, source: int, group: dist.ProcessGroup | None) -> None:
        """Through the host: weights are sent once, when a run begins."""
        (host,) = self.to_host([tensor])
        dist.broadcast(host, src=source, group=group)
        with torch.no_grad():
            tensor.copy_(as_data(host, tensor.device))

    def rank_as_data(self, rank: int) -> Tensor:
        if rank not in self._ranks:
            self._ranks[rank] = as_data(torch.tensor(rank, device="cpu"), torch_xla.device())
        return self._ranks[rank]

    @property
    def _communication(self) -> Emulation | Replicas:
        if self._collectives is None:  # the process group was made by somebody else
            self._collectives = self._choose_collectives()
        return self._collectives

    def _choose_collectives(self) -> Emulation | Replicas:
        world, replicas = dist.get_world_size(), xr.world_size()
        if world == replicas:
            return Replicas()
        if self.hardware == "CPU" and replicas == 1:
            if dist.get_rank() == 0:
                _log.warning(
                    "torch-xla's CPU device has no collectives between processes: those of %d ranks are EMULATED by "
                    "copies through the host. This is for tests and debugging; it says nothing about speed, nor "
                    "about graphs that hold collectives.",
                    world,
                )
            return Emulation()
        raise ParallelStateError(
            f"torch.distributed has {world} rank(s) but XLA's world has {replicas}: its collectives would return wrong "
            "numbers without an error. Start one process per core with torchrun, set PJRT_DEVICE before torch_xla is "
            "imported, and leave NEURON_PJRT_* to torch_xla."
        )

    # -- steps, precision, randomness ------------------------------------------------------------------

    def mark_step(self) -> None:
        """Ends the recorded graph and starts it on the device."""
        torch_xla.sync()

    def synchronize(self) -> None:
        torch_xla.sync(wait=True)

    def scalar(self, value: float, like: Tensor) -> Tensor:
        return as_data(torch.tensor(value, dtype=like.dtype, device="cpu"), like.device)

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[Any]:
        return torch.autocast("xla", dtype=dtype)

    def compile(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = torch.compile(fn, dynamic=False, backend="openxla")
        return compiled

    def get_rng_state(self) -> Tensor:
        seed = int(xm.get_rng_state()) & (2 ** (8 * _SEED_BYTES) - 1)
        return torch.frombuffer(bytearray(seed.to_bytes(_SEED_BYTES, "little")), dtype=torch.uint8)

    def set_rng_state(self, state: Tensor) -> None:
        xm.set_rng_state(int.from_bytes(bytes(state.tolist()[:_SEED_BYTES]), "little"))

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Ends the graph first: what is pending would be compiled once for each tensor that is read."""
        torch_xla.sync()
        mine = [t.detach() for t in tensors]
        on_device = [t for t in mine if t.device.type == self.device_type]
        fetched = iter(torch_xla._XLAC._xla_get_cpu_tensors(on_device) if on_device else ())
        return [next(fetched) if t.device.type == self.device_type else t for t in mine]

    def graph_counts(self) -> Counts:
        return graphs.counts()
