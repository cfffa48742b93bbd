"""Warm ranks for the distributed tests, and a watch over what a test leaves behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from neuron_lightning.testing import RankPool
from tests.devices import is_simulated

if is_simulated():
    from tests.sim.pool import TOTALS
    from tests.sim.pool import WatchedPool as Pool
elif os.environ.get("NEURON_LIGHTNING_TEST_RANKS") == "xla":  # set by `python -m tests.xla`
    from tests.xla.pool import XLAPool as Pool
else:
    from neuron_lightning.testing import RankPool as Pool

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--sim-share``: on the simulated device, a part of the tests."""
    parser.addoption("--sim-share", action="store_true", help="every other test function, once")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the share: all about the device itself, and every other function with one set of its parameters."""
    if not config.getoption("--sim-share"):
        return
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = set()
    for number, (name, found) in enumerate(functions.items()):
        if "tests/sim/" in name:
            kept.update(found)
        elif number % 2:
            kept.add(found[sum(map(ord, name)) % len(found)])
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(scope="session")
def pool1() -> Iterator[RankPool]:
    """One warm rank with a process group."""
    with Pool(1) as pool:
        yield pool


@pytest.fixture(scope="session")
def pool2() -> Iterator[RankPool]:
    """Two warm ranks."""
    with Pool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def pool4() -> Iterator[RankPool]:
    """Four warm ranks."""
    with Pool(4) as pool:
        yield pool


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the simulated device was asked to do."""
    if is_simulated():
        terminalreporter.write_line(
            f"simulated neuron device: {TOTALS.calls} calls on warm ranks, {TOTALS.operators} operators, "
            f"{TOTALS.collectives} collectives in the same order on all ranks, "
            f"fallbacks to the CPU by the package: {dict(TOTALS.fallbacks) or 'none'}"
        )
