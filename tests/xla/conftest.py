"""The suite on real torch-xla: its ranks run on PJRT's CPU device, the references on plain PyTorch of the same version."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from neuron_lightning.testing import RankPool
from tests.xla.pool import XLA

if importlib.util.find_spec("torch_xla") is None:
    collect_ignore_glob = ["test_*.py"]  # `make test-xla` has an environment of its own

HOST = {"NEURON_LIGHTNING_BACKEND": "cpu"}


def _pool(world_size: int, env: dict[str, str]) -> Iterator[RankPool]:
    with RankPool(world_size, env=env) as pool:
        yield pool


@pytest.fixture(scope="session")
def host() -> Iterator[RankPool]:
    """One rank on plain PyTorch."""
    yield from _pool(1, HOST)


@pytest.fixture(scope="session")
def xla1() -> Iterator[RankPool]:
    """One rank on torch-xla."""
    yield from _pool(1, XLA)


@pytest.fixture(scope="session")
def xla2() -> Iterator[RankPool]:
    """Two ranks on torch-xla."""
    yield from _pool(2, XLA)


@pytest.fixture(scope="session")
def xla4() -> Iterator[RankPool]:
    """Four ranks on torch-xla."""
    yield from _pool(4, XLA)
