"""Warm ranks on torch-xla for the tests that know nothing of it; what they return is on the host."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch

from neuron_lightning.testing import RankPool

XLA = {"PJRT_DEVICE": "CPU", "NEURON_LIGHTNING_BACKEND": "xla"}


class XLAPool(RankPool):
    """As :class:`RankPool`, with PJRT's CPU device and emulated collectives."""

    def __init__(self, world_size: int) -> None:
        super().__init__(world_size, env=XLA)

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 300.0, **kwargs: Any) -> list[Any]:
        """As :meth:`RankPool.run`."""
        written = super().run(_to_host, fn, args, kwargs, timeout=timeout)
        return [torch.load(io.BytesIO(value), map_location="cpu", weights_only=False) for value in written]


def _to_host(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    value = fn(*args, **kwargs)
    torch.save(_moved(value), written := io.BytesIO())
    return written.getvalue()


def _moved(value: Any) -> Any:
    """XLA's tensors cannot be pickled as they are."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _moved(one) for key, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_moved, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(_moved, value))
    return value
