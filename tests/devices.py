"""Where a rank of the tests computes: on the host, or on the simulated device where a run of the tests has one."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._device import DeviceContext, _device_constructors

from neuron_lightning.backends import get_backend
from neuron_lightning.parallel import mesh, parallel_state


def device() -> torch.device:
    """The device of this rank."""
    return get_backend().device(int(os.environ.get("LOCAL_RANK", "0")))


def is_simulated() -> bool:
    """Whether this run of the tests has a simulated device."""
    return importlib.util.find_spec("neuron_sim") is not None


class _Placed(DeviceContext):
    """As ``with torch.device(…)``, but numbers drawn from a generator of the CPU are drawn there and moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if func in _device_constructors() and generator is not None and generator.device.type == "cpu":
            return func(*args, **{**kwargs, "device": "cpu"}).to(self.device)
        return super().__torch_function__(func, types, args, kwargs)


@contextlib.contextmanager
def on_device() -> Iterator[torch.device]:
    """Makes it the device of what is built in the block and names none, and yields it."""
    here = device()
    get_backend().set_device(here)
    with contextlib.nullcontext() if here.type == "cpu" else _Placed(here):
        yield here


def layout_if(many: bool, *sizes: int, **options: Any) -> contextlib.AbstractContextManager[Any]:
    """As :func:`layout`, where there are many ranks; a single process computes on the host, without a mesh."""
    return layout(*sizes, **options) if many else contextlib.nullcontext()


@contextlib.contextmanager
def layout(tensor_model_parallel_size: int = 1, **options: Any) -> Iterator[mesh.Mesh]:
    """The mesh of a case, for as long as it lasts, with everything built on the device. All ranks together."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size, **options)
    try:
        with on_device():
            yield mesh.current()
    finally:
        parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Makes it the dtype of what is built in the block and names none."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
