"""Parallel optimizers against plain torch, in float64."""

from __future__ import annotations

import pytest
import torch

from neuron_lightning.testing import RankPool
from tests.dist.optim_cases import train_parallel, train_reference

STEPS = 20


@pytest.mark.parametrize("zero1", [False, True], ids=["plain", "zero1"])
@pytest.mark.parametrize(
    ("name", "micros", "clip", "bucket_bytes"),
    [
        ("adam", 1, 0.5, 2**20),
        ("adamw", 3, 0.5, 600),
        ("sgd", 2, None, 600),
        ("adagrad", 1, 0.3, 2**20),
        ("rmsprop", 1, None, 100),
    ],
)
@pytest.mark.parametrize("dp", [2, 4])
def test_trains_like_torch_on_the_averaged_gradient(
    request: pytest.FixtureRequest,
    dp: int,
    name: str,
    micros: int,
    clip: float | None,
    bucket_bytes: int,
    zero1: bool,
) -> None:
    """20 steps with unused, rank-dependent, sometimes used, tied, 0-d and empty parameters, two groups."""
    pool: RankPool = request.getfixturevalue(f"pool{dp}")
    expected, norms = train_reference(name, dp, STEPS, micros, clip)
    for weights, seen in pool.run(train_parallel, name, zero1, STEPS, micros, clip, bucket_bytes):
        assert (weights - expected).abs().max() <= 1e-12
        assert seen == pytest.approx(norms, rel=1e-12)


def test_one_process_needs_no_process_group() -> None:
    """The same code without torch.distributed, with and without ZeRO-1."""
    from neuron_lightning.optim import ParallelOptimizer
    from tests.dist.optim_cases import CLASSES, Net, vector

    expected, norms = train_reference("adamw", 1, 5, 1, 0.5)
    for zero1 in (False, True):
        net = Net()
        optimizer = ParallelOptimizer(CLASSES["adamw"](net.groups()), zero1=zero1, max_grad_norm=0.5)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1.0 / (1 + 0.1 * s))
        for step in range(5):
            optimizer.zero_grad()
            net.loss(step, 0, 0, 1, 1).backward()
            optimizer.step()
            scheduler.step()
            assert optimizer.grad_norm is not None
            assert optimizer.grad_norm.item() == pytest.approx(norms[step], rel=1e-9)
        assert (vector(net) - expected).abs().max() <= 1e-12
