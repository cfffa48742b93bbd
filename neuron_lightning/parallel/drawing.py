"""Random numbers by position: element i of a named tensor is a pure function of (seed, name, i).

A rank can so produce its slice of a global tensor, and nothing else, and get bit for bit what any other
layout gets. The generator is numpy's counter-based Philox 4x64 (Salmon et al. 2011): the name and the seed
make its key, element i uses its 64-bit number i.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_CHUNK = 1 << 16
"""Elements transformed at a time; their temporaries fit a core's cache."""
_LANES = 64
"""Chunks are padded to a multiple of this, so that no element falls into a vector loop's scalar tail."""


class Distribution(NamedTuple):
    """What a tensor's elements are drawn from: normal (mean, std), uniform (low, high), constant (value, -)."""

    kind: Literal["normal", "uniform", "constant"]
    first: float
    second: float = 0.0


def key_of(seed: int, name: str) -> int:
    """The 128-bit Philox key of a named tensor."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest(), "little")


def fill_box(
    box: Tensor, global_shape: tuple[int, ...], offset: tuple[int, ...], distribution: Distribution, key: int
) -> None:
    """Fills ``box`` with its part of a global tensor, without producing the rest.

    Values are computed in float64, rounded to float32 and then cast to the dtype of ``box``, so that they are
    the same weights in every dtype. A box may cut dimensions 0 and 1 only.

    Args:
        box: the view to fill, on any device.
        global_shape: shape of the global tensor.
        offset: where the box starts in it.
        distribution: what to draw.
        key: see :func:`key_of`.
    """
    if box.numel() == 0:
        return
    with torch.no_grad():
        if distribution.kind == "constant":
            box.fill_(distribution.first)
            return
        stride = math.prod(global_shape[1:])
        start = offset[0] * stride if offset else 0
        if len(offset) > 1:
            start += offset[1] * math.prod(global_shape[2:])
        width = math.prod(box.shape[1:])
        if width == stride and box.is_contiguous():
            _fill_run(box.view(-1), start, distribution, key)
        else:
            _fill_rows(box, start, stride, distribution, key)


def _fill_run(flat: Tensor, start: int, distribution: Distribution, key: int) -> None:
    for done in range(0, flat.numel(), _CHUNK):
        count = min(_CHUNK, flat.numel() - done)
        values = _transform(_numbers(key, start + done, count), distribution)
        flat[done : done + count].copy_(torch.from_numpy(values))


def _fill_rows(box: Tensor, start: int, stride: int, distribution: Distribution, key: int) -> None:
    width = math.prod(box.shape[1:])
    step = max(1, _CHUNK // width)
    for row in range(0, box.shape[0], step):
        rows = min(step, box.shape[0] - row)
        raw = np.empty((rows, width), dtype=np.uint64)
        for i in range(rows):
            raw[i] = _numbers(key, start + (row + i) * stride, width)
        values = _transform(raw.reshape(-1), distribution)
        box[row : row + rows].copy_(torch.from_numpy(values).view(rows, *box.shape[1:]))


def _numbers(key: int, start: int, count: int) -> NDArray[np.uint64]:
    """Raw 64-bit numbers ``start`` to ``start + count`` of the stream; a counter value makes four of them."""
    block, lead = divmod(start, 4)
    raw: NDArray[np.uint64] = np.random.Philox(key=key, counter=block).random_raw(lead + count)
    return raw[lead:]


def _transform(raw: NDArray[np.uint64], distribution: Distribution) -> NDArray[np.float32]:
    count = raw.size
    padded: NDArray[np.uint64] = np.zeros(-(-count // _LANES) * _LANES, dtype=np.uint64)
    padded[:count] = raw
    if distribution.kind == "uniform":
        low, high = distribution.first, distribution.second
        values = (padded >> np.uint64(11)).astype(np.float64)
        values *= (high - low) * 2.0**-53
        values += low
    else:
        values = _box_muller(padded)
        values *= distribution.second
        values += distribution.first
    rounded: NDArray[np.float32] = values.astype(np.float32)
    return rounded[:count]


def _box_muller(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One standard normal number from each 64 bits: the radius from one half, the angle from the other."""
    halves = raw.astype("<u8", copy=False).view("<u4")
    radius = halves[1::2].astype(np.float64)
    radius += 1.0
    radius *= 2.0**-32
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    angle = halves[0::2].astype(np.float64)
    angle *= 2.0 * math.pi * 2.0**-32
    np.cos(angle, out=angle)
    radius *= angle
    return radius


# -- what an init_method draws -------------------------------------------------------------------------


def recognise(method: Callable[[Tensor], object], global_shape: tuple[int, ...]) -> Distribution | None:
    """What ``method`` would fill a tensor of ``global_shape`` with, or None if it is more than one plain draw.

    The method is called on a tensor without storage and watched: ``torch.nn.init``'s normal, uniform,
    constant, Xavier and Kaiming families, their partials, and any function that ends in one such draw are
    recognised, with the fans of the global shape.
    """
    probe = torch.empty(global_shape, device="meta")
    watch = _Watch()
    try:
        with seeded(0), torch.no_grad(), watch:
            method(probe)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return None  # it needs real values, or it is wrong: running it for real will tell
    return watch.distribution(probe)


class seeded:
    """Context in which torch's CPU generator starts from ``seed``; its state is put back afterwards."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(self._seed % (1 << 63))

    def __exit__(self, *_: object) -> None:
        torch.default_generator.set_state(self._state)


_ALIASES = {"aten::detach", "aten::alias", "aten::view", "aten::_unsafe_view"}


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operators that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name not in _ALIASES:
            self.calls.append((name, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def distribution(self, probe: Tensor) -> Distribution | None:
        if len(self.calls) != 1:
            return None
        name, args, kwargs = self.calls[0]
        if not isinstance(args[0], Tensor) or args[0].shape != probe.shape or kwargs.get("generator"):
            return None
        numbers = [float(x) for x in args[1:] if isinstance(x, int | float)]
        if len(numbers) != len(args) - 1:
            return None
        if name == "aten::normal_":
            return Distribution("normal", *(numbers + [0.0, 1.0][len(numbers) :]))
        if name == "aten::uniform_":
            return Distribution("uniform", *(numbers + [0.0, 1.0][len(numbers) :]))
        if name == "aten::zero_":
            return Distribution("constant", 0.0)
        if name == "aten::fill_":
            return Distribution("constant", numbers[0])
        return None
