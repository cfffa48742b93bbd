"""Backends on plain ``torch.distributed``: ``cpu``, ``cuda`` and ``neuron`` share this one class.

The table :data:`_FACTS` is all that tells them apart; the code below it never branches on the device type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neuron_lightning.backends.base import Backend
from neuron_lightning.backends.host_group import settle_and_destroy
from neuron_lightning.backends.host_memory import host_memory, keep_freed_memory

# Renamed in torch 2.13; the old names warn there.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """One row of the table of devices."""

    process_group_backend: str
    """Argument of ``init_process_group``; CPU tensors are always served."""
    native_reduce_scatter: bool
    """False where reduce-scatter is slower than an all-reduce of the same buffer (gloo, measured 1.5-5x)."""
    compiler: str | None
    """``backend=`` of ``torch.compile``; None for its default."""
    supports_float64: bool
    peak_flops: dict[torch.dtype, float]
    """Dense peak of one device, FLOP/s, where the vendor publishes one that holds for every model of it."""


_FACTS = {
    "cpu": _Facts(
        process_group_backend="gloo",
        native_reduce_scatter=False,
        compiler=None,
        supports_float64=True,
        peak_flops={},
    ),
    "cuda": _Facts(
        process_group_backend="cpu:gloo,cuda:nccl",
        native_reduce_scatter=True,
        compiler=None,
        supports_float64=True,
        peak_flops={},
    ),
    # trn2: 667 TFLOP/s dense bf16 per chip of 8 cores (AWS, Trainium2 architecture).
    "neuron": _Facts(
        process_group_backend="cpu:gloo,neuron:neuron",
        native_reduce_scatter=True,
        compiler="neuron",
        supports_float64=False,
        peak_flops={torch.bfloat16: 83.4e12},
    ),
}


class NativeBackend(Backend):
    """A device that PyTorch itself knows, reached through ``torch.accelerator``-style modules.

    Args:
        device_type: ``cpu``, ``cuda`` or ``neuron``.
    """

    def __init__(self, device_type: str) -> None:
        self._facts = _FACTS[device_type]
        self.name = self.device_type = device_type
        self.process_group_backend = self._facts.process_group_backend
        self.mesh_device_type = device_type
        self.supports_float64 = self._facts.supports_float64

    @property
    def _module(self) -> ModuleType | None:
        """``torch.cuda``, ``torch.neuron``, …; None if this torch has no such device."""
        module: ModuleType | None = getattr(torch, self.device_type, None)
        return module

    @property
    def _is_host(self) -> bool:
        return self.device_type == "cpu"

    def adopt_process(self) -> None:
        if self._is_host:
            keep_freed_memory()

    def is_available(self) -> bool:
        module = self._module
        return module is not None and bool(module.is_available())

    def device_count(self) -> int:
        module = self._module
        return int(module.device_count()) if module is not None and module.is_available() else 0

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu") if self._is_host else torch.device(self.device_type, local_rank)

    def set_device(self, device: torch.device) -> None:
        if not self._is_host:
            torch.accelerator.set_device_index(device.index or 0)

    def current_device(self) -> torch.device:
        return self.device(0 if self._is_host else torch.accelerator.current_device_index())

    def empty_cache(self) -> None:
        module = self._module
        if not self._is_host and module is not None and hasattr(module, "empty_cache"):
            module.empty_cache()

    def memory_stats(self, device: torch.device) -> dict[str, float]:
        if self._is_host:
            return host_memory()
        return {
            "allocated": float(torch.accelerator.memory_allocated(device)),
            "peak_allocated": float(torch.accelerator.max_memory_allocated(device)),
        }

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        return self._facts.peak_flops.get(dtype)

    def init_process_group(self, *, rank: int, world_size: int, timeout: timedelta) -> None:
        dist.init_process_group(self.process_group_backend, rank=rank, world_size=world_size, timeout=timeout)

    def destroy_process_group(self) -> None:
        settle_and_destroy()

    def all_reduce(
        self,
        tensor: Tensor,
        group: dist.ProcessGroup | None,
        op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
        async_op: bool = False,
    ) -> dist.Work | None:
        return dist.all_reduce(tensor, op=op, group=group, async_op=async_op)  # type: ignore[no-any-return]

    def all_gather(
        self, output: Tensor, shard: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
    ) -> dist.Work | None:
        return _all_gather_single(output, shard, group=group, async_op=async_op)  # type: ignore[no-any-return]

    def reduce_scatter(
        self, shard: Tensor, full: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
    ) -> dist.Work | None:
        if self._facts.native_reduce_scatter:
            return _reduce_scatter_single(shard, full, group=group, async_op=async_op)  # type: ignore[no-any-return]
        work = dist.all_reduce(full, group=group, async_op=async_op)
        if not async_op:
            mine = full.narrow(0, dist.get_rank(group) * shard.shape[0], shard.shape[0])
            if torch.compiler.is_compiling() or mine.data_ptr() != shard.data_ptr():
                shard.copy_(mine)
        return work  # type: ignore[no-any-return]

    def mark_step(self) -> None:
        """Eager devices have no graph to end."""

    def synchronize(self) -> None:
        if not self._is_host:
            torch.accelerator.synchronize()

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[Any]:
        return torch.autocast(self.device_type, dtype=dtype)

    def compile(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        options: dict[str, Any] = {"backend": self._facts.compiler} if self._facts.compiler else {}
        compiled: Callable[..., Any] = torch.compile(fn, dynamic=False, **options)
        return compiled

    def get_rng_state(self) -> Tensor:
        module = self._module
        if self._is_host or module is None:
            return torch.get_rng_state()
        state: Tensor = module.get_rng_state()
        return state

    def set_rng_state(self, state: Tensor) -> None:
        module = self._module
        if self._is_host or module is None:
            torch.set_rng_state(state)
        else:
            module.set_rng_state(state)

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        host = [t.detach().to("cpu", non_blocking=True) for t in tensors]
        self.synchronize()
        return host
