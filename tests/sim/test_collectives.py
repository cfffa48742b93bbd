"""The process-group backend `neuron`: every collective, groups split from others, and PyTorch's own parallelism on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuron_lightning.testing import RankPool, run_distributed
from tests.sim import ranks
from tests.sim.pool import ON_DEVICE


@pytest.mark.parametrize(
    "check",
    [
        ranks.check_reductions,
        ranks.check_asynchronous_mean,
        ranks.check_exchanges,
        ranks.check_functional_collectives,
        ranks.check_dtensor,
    ],
    ids=lambda check: check.__name__,
)
def test_collectives_on_tensors_of_the_device(pool2: RankPool, check) -> None:
    pool2.run(check)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tensor parallel"])
def test_pytorchs_own_parallelism(pool2: RankPool, kind: str) -> None:
    pool2.run(ranks.check_pytorchs_own_parallelism, kind)


@pytest.mark.parametrize("background", [False, True])
def test_pytorchs_own_checkpoints(pool2: RankPool, tmp_path: Path, background: bool) -> None:
    pool2.run(ranks.check_distributed_checkpoint, str(tmp_path / "a"), background)


def test_groups_of_a_mesh(pool4: RankPool) -> None:
    for rank, groups in enumerate(pool4.run(ranks.check_split_groups)):
        assert groups == [(rank // 2 * 2, rank // 2 * 2 + 1), (rank % 2, rank % 2 + 2)]


def test_groups_that_are_split_from_the_world() -> None:
    found = run_distributed(ranks.start_bound_to_the_device, 4, init_process_group=False, env=ON_DEVICE)
    for rank, groups in enumerate(found):
        half = (rank // 2 * 2, rank // 2 * 2 + 1)
        assert groups == [half, half, (rank % 2, rank % 2 + 2)]


def test_another_order_of_collectives_is_found(pool2: RankPool) -> None:
    with pytest.raises(AssertionError, match=r"call 1 in the group of ranks \(0, 1\): rank 0 made .*numel=3"):
        pool2.run(ranks.call_in_another_order)
    pool2.close()
