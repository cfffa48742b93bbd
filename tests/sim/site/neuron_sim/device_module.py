"""`torch.neuron`: what PyTorch and its users ask a device's module for."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neuron_sim import _C

_initialized = True  # torch.utils.checkpoint reads it before it saves a random state
Event = torch.Event
default_generators = tuple(_C.default_generator(index) for index in range(_C.device_count()))
device_count = _C.device_count
current_device = _C.current_device


def _index(device: Any = None) -> int:
    if device is None:
        return _C.current_device()
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return _C.current_device() if index is None else index


# -- devices -------------------------------------------------------------------------------------------


def is_available() -> bool:
    return _C.device_count() > 0


def is_initialized() -> bool:
    return True


def init() -> None:
    """Nothing to do: loading was all."""


_lazy_init = init


def _is_in_bad_fork() -> bool:
    return False


def set_device(device: Any) -> None:
    _C.set_device(_index(device))


def _exchange_device(index: int) -> int:
    before = _C.current_device()
    if index >= 0:
        _C.set_device(index)
    return before


_maybe_exchange_device = _exchange_device


class device:
    """Makes a device the current one for a while."""

    def __init__(self, device: Any) -> None:
        self.idx = _index(device)

    def __enter__(self) -> None:
        self.prev_idx = _exchange_device(self.idx)

    def __exit__(self, *error: object) -> None:
        _C.set_device(self.prev_idx)


def get_device_name(device: Any = None) -> str:
    return "Simulated NeuronCore"


def synchronize(device: Any = None) -> None:
    """All work has ended when a kernel returns."""


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


def is_bf16_supported() -> bool:
    return True


# -- streams -------------------------------------------------------------------------------------------


class Stream(torch.Stream):
    """A name only."""

    def __new__(cls, device: Any = None, priority: int = 0, **more: Any) -> Stream:
        return super().__new__(cls, device=torch.device("neuron", _index(device)), priority=priority, **more)


def current_stream(device: Any = None) -> torch.Stream:
    return torch.accelerator.current_stream(torch.device("neuron", _index(device)))


default_stream = current_stream


def set_stream(stream: torch.Stream) -> None:
    torch.accelerator.set_stream(stream)


def stream(stream: torch.Stream | None) -> Any:
    return contextlib.nullcontext() if stream is None else stream


# -- random numbers ------------------------------------------------------------------------------------


def manual_seed(seed: int) -> None:
    default_generators[_C.current_device()].manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    for generator in default_generators:
        generator.manual_seed(seed)


def initial_seed() -> int:
    return default_generators[_C.current_device()].initial_seed()


def get_rng_state(device: Any = "neuron") -> Tensor:
    return default_generators[_index(device)].get_state()


def set_rng_state(state: Tensor, device: Any = "neuron") -> None:
    default_generators[_index(device)].set_state(state)


def get_rng_state_all() -> list[Tensor]:
    return [generator.get_state() for generator in default_generators]


def set_rng_state_all(states: Sequence[Tensor]) -> None:
    for generator, state in zip(default_generators, states, strict=True):
        generator.set_state(state)


# -- memory --------------------------------------------------------------------------------------------


def empty_cache() -> None:
    """Nothing is cached."""


def memory_allocated(device: Any = None) -> int:
    return torch.accelerator.memory_allocated(_index(device))


def max_memory_allocated(device: Any = None) -> int:
    return torch.accelerator.max_memory_allocated(_index(device))


memory_reserved, max_memory_reserved = memory_allocated, max_memory_allocated


def memory_stats(device: Any = None) -> dict[str, Any]:
    return torch.accelerator.memory_stats(_index(device))


def reset_peak_memory_stats(device: Any = None) -> None:
    torch.accelerator.reset_peak_memory_stats(_index(device))
