"""TP=2 and TP=4 start from exactly the weights of TP=1."""

from __future__ import annotations

import pytest
import torch

from neuron_lightning.testing import RankPool
from tests.dist import initialize_ranks as ranks


@pytest.mark.parametrize("how", ["meta", "deferred", "alone"])
@pytest.mark.parametrize("tp", [2, 4])
def test_slices_equal_those_of_one_rank_bit_for_bit(
    request: pytest.FixtureRequest, pool1: RankPool, tp: int, how: str
) -> None:
    pool: RankPool = request.getfixturevalue(f"pool{tp}")
    one = ranks.assemble(pool1.run(ranks.boxes, 1, how))
    several = ranks.assemble(pool.run(ranks.boxes, tp, how))
    assert one.keys() == several.keys()
    for name, full in one.items():
        assert torch.equal(full, several[name]), name


def test_the_dtype_does_not_change_what_is_drawn(pool1: RankPool) -> None:
    single = ranks.assemble(pool1.run(ranks.boxes, 1, "meta", torch.float32))
    double = ranks.assemble(pool1.run(ranks.boxes, 1, "meta", torch.float64))
    half = ranks.assemble(pool1.run(ranks.boxes, 1, "meta", torch.bfloat16))
    for name, full in single.items():
        if not name.startswith("plain"):  # torch's own layer draws by its own rule
            assert torch.equal(full.double(), double[name]), name
            assert torch.equal(full.bfloat16(), half[name]), name
