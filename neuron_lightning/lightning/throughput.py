"""Tokens per second, counted on the host from the shapes of batches."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Speedometer:
    """Tokens (or samples) per second between two readings, pauses left out."""

    def __init__(self) -> None:
        self._count = 0
        self._unit = "tokens/s"
        self._since: float | None = None
        self._paused_at: float | None = None

    def start(self) -> None:
        """Starts the clock with the first batch."""
        if self._since is None:
            self._since = time.monotonic()

    def add(self, batch: Any, replicas: int) -> None:
        """Counts a batch that each of ``replicas`` data-parallel ranks had one like."""
        count, unit = count_batch(batch)
        if unit != self._unit:
            self._count, self._unit = 0, unit
        self._count += count * replicas

    def pause(self) -> None:
        """Stops the clock."""
        if self._paused_at is None:
            self._paused_at = time.monotonic()

    def resume(self) -> None:
        """Lets the clock go on."""
        if self._since is not None and self._paused_at is not None:
            self._since += time.monotonic() - self._paused_at
        self._paused_at = None

    def read(self) -> tuple[str, float] | None:
        """(unit, rate) since the last reading; None if nothing was counted."""
        now = time.monotonic()
        if self._since is None or not self._count or now <= self._since:
            return None
        rate = self._count / (now - self._since)
        self._count, self._since = 0, now
        return self._unit, rate


def count_batch(batch: Any) -> tuple[int, str]:
    """Tokens in a batch that holds token ids, else its samples, from shapes alone: (count, unit per second)."""
    if isinstance(batch, Mapping) and isinstance(ids := batch.get("input_ids"), Tensor):
        return ids.numel(), "tokens/s"
    first = _first_tensor(batch)
    if first is None or not first.dim():
        return 0, "samples/s"
    if first.dim() == 2 and first.dtype in (torch.int64, torch.int32):
        return first.numel(), "tokens/s"
    return first.shape[0], "samples/s"


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else ()
    if isinstance(items, str | bytes):
        return None
    return next((found for item in items if (found := _first_tensor(item)) is not None), None)
