"""Warm ranks on the simulated device, which watch what every test asks of it."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import neuron_lightning
from neuron_lightning.backends.select import ENVIRONMENT_VARIABLE
from neuron_lightning.testing import RankFailure, RankPool

PACKAGE = os.path.dirname(neuron_lightning.__file__) + os.sep

ON_DEVICE = {ENVIRONMENT_VARIABLE: "neuron"}
"""What ranks are told: the process that starts them computes on the host."""

FALLBACKS_ALLOWED: dict[tuple[str, str], str] = {}
"""(Operator, file in the package) -> why it may fall back to the CPU there. Documented in docs/simulation.md."""


@dataclass
class Totals:
    """Over all tests of this run.

    Attributes:
        calls: of functions on all ranks together.
        operators: that ran on the device.
        fallbacks: of the package's code, by operator; what a test asks for itself is not counted.
        collectives: whose order was compared.
    """

    calls: int = 0
    operators: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    collectives: int = 0


TOTALS = Totals()


class WatchedPool(RankPool):
    """A pool whose ranks must call the same collectives in the same order; returned tensors are on the host."""

    def __init__(self, world_size: int) -> None:
        super().__init__(world_size, env=ON_DEVICE)

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """As :meth:`RankPool.run`.

        Raises:
            AssertionError: a group's ranks called different collectives.
        """
        from neuron_sim import records

        try:
            answers = super().run(_watch, fn, args, kwargs, timeout=timeout)
        except RankFailure as failure:
            _skip_refused(str(failure))
            raise
        counts = [seen for _, seen, _ in answers]
        records.check_order([seen.collectives for seen in counts])
        TOTALS.calls += 1
        for seen in counts:
            TOTALS.operators += sum(seen.operators.values())
            TOTALS.collectives += len(seen.collectives)
        for _, _, places in answers:
            _check_fallbacks(places)
        values = [
            torch.load(io.BytesIO(value), map_location="cpu", weights_only=False) for value, _, _ in answers
        ]
        for value in values:
            _skip_refused(value)
        return values


def _skip_refused(said: Any) -> None:
    """Skips a test that needs a precision which the package refuses on neuron devices."""
    for words in ("which neuron devices lack", "is refused on neuron"):
        if isinstance(said, str) and words in said:
            pytest.skip("needs a precision that is refused on neuron devices")


def _check_fallbacks(places: Counter[Any]) -> None:
    for place, number in places.items():
        if place.what == "fallback" and place.file.startswith(PACKAGE):
            assert (place.operator, place.file.removeprefix(PACKAGE)) in FALLBACKS_ALLOWED, str(place)
            TOTALS.fallbacks[place.operator] += number


def _watch(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bytes, Any, Any]:
    from neuron_sim import records

    records.reset()
    with records.places() as places:
        value = fn(*args, **kwargs)
    seen = records.counts()
    written = io.BytesIO()
    torch.save(value, written)
    return written.getvalue(), seen, places
