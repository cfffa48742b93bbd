"""Warm ranks for the distributed tests, and a watch over what a test leaves behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from neuron_lightning.testing import RankPool

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def pool1() -> Iterator[RankPool]:
    """One warm rank with a process group."""
    with RankPool(1) as pool:
        yield pool


@pytest.fixture(scope="session")
def pool2() -> Iterator[RankPool]:
    """Two warm ranks."""
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def pool4() -> Iterator[RankPool]:
    """Four warm ranks."""
    with RankPool(4) as pool:
        yield pool
