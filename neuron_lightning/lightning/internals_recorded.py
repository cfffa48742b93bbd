"""The private parts of Lightning's logging that a device which records graphs needs, each with its reason.

The third part of :mod:`internals`, under the same rules. Nothing here does anything on other devices.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from neuron_lightning.backends import get_backend

_STATES = ("value", "cumulated_batch_size")
_CACHES = ("_forward_cache", "_computed")
_TO_TENSOR = "_LightningModule__to_tensor"


def keep_numbers_on_host(module: LightningModule) -> None:
    """Numbers that are logged stay in host memory.

    Reason: Lightning makes a device tensor of each, without a dimension: then a learning rate of 0.0 or 1.0 and the
    first steps' ``global_step`` become constants of a graph, which is compiled again for each.
    """
    if not get_backend().records_graphs or _TO_TENSOR in vars(module):
        return
    to_tensor: Callable[[Any, str], Tensor] = getattr(module, _TO_TENSOR)

    def on_host(value: Any, name: str) -> Tensor:
        if isinstance(value, numbers.Number):
            return torch.tensor(value, device="cpu", dtype=torch.get_default_dtype())
        return to_tensor(value, name)

    object.__setattr__(module, _TO_TENSOR, on_host)


def fetched(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics on the host, in one transfer.

    Reason: Lightning reads each with ``.item()``, which compiles a graph for what is pending and transfers it alone.
    """
    held = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    if not held or not get_backend().records_graphs:
        return metrics
    return {**metrics, **dict(zip(held, get_backend().to_host(list(held.values())), strict=True))}


def reset_to_data(trainer: Trainer) -> None:
    """Results that start over start from numbers that are data.

    Reason: Lightning starts them from tensors of 0 without a dimension, which are constants of the graph of an epoch's
    first step: it is another graph than that of the steps after it.
    """
    backend = get_backend()
    if not backend.records_graphs:
        return
    fit: Any = trainer.fit_loop.epoch_loop
    for loop in (fit, fit.val_loop, trainer.validate_loop, trainer.test_loop):
        results: Any = loop._results
        original = type(results).reset

        def reset(*args: Any, _results: Any = results, _call: Any = original, **kwargs: Any) -> None:
            _call(_results, *args, **kwargs)
            for metric in _results.values():
                for name in _STATES if metric.is_tensor else ():
                    value = getattr(metric, name, None)
                    if isinstance(value, Tensor) and value.device.type == backend.device_type:
                        setattr(metric, name, backend.scalar(_start(metric.meta, name), value))

        results.reset = reset


def _start(meta: Any, name: str) -> float:
    """What a result starts from; Lightning's own default is on the device, where reading it takes a transfer."""
    if name == "value" and (meta.is_max_reduction or meta.is_min_reduction):
        return -math.inf if meta.is_max_reduction else math.inf
    return 0.0


@contextmanager
def results_on_host(trainer: Trainer, *, on_step: bool) -> Iterator[None]:
    """Inside, the results of a loop lie in host memory, so that means are formed and numbers read there.

    Reason: as :func:`fetched`; and the mean of an epoch would be a graph that is first met when the epoch ends.

    Args:
        trainer: whose current loop it is.
        on_step: only values of single batches will be read, and only by a progress bar.
    """
    results: Any = trainer._results
    if not results or not get_backend().records_graphs:
        yield
        return
    tensors = [
        m for m in results.values() if m.is_tensor and (not on_step or (m.meta.prog_bar and m.meta.on_step))
    ]
    names = ("_forward_cache",) if on_step else (*_STATES, *_CACHES)
    held = [(m, n, v) for m in tensors for n in names if isinstance(v := getattr(m, n, None), Tensor)]
    for (metric, name, _), host in zip(held, get_backend().to_host([v for _, _, v in held]), strict=True):
        setattr(metric, name, host)
    try:
        yield
    finally:
        for metric, name, live in held:
            if name in _STATES:  # they go on; the caches have been read and are made anew
                setattr(metric, name, live)
