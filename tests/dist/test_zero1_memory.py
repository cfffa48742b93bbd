"""Memory of ZeRO-1 against its formula, small; ``tools/memory_zero1.py`` measures it at 40 M parameters."""

from __future__ import annotations

import pytest

from neuron_lightning.testing import RankPool
from tools.memory_zero1 import KINDS, TOLERANCE, measure


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dp", [2, 4])
def test_live_storages_are_those_of_the_formula(request: pytest.FixtureRequest, dp: int, name: str) -> None:
    pool: RankPool = request.getfixturevalue(f"pool{dp}")
    for num_params, live, _ in pool.run(measure, KINDS[name], 6, 256):
        assert live / num_params == pytest.approx(KINDS[name].expected(dp), rel=TOLERANCE)
