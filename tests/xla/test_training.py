"""The Llama slice on torch-xla: the losses of plain PyTorch, and a number of graphs that is fixed by step 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_lightning.testing import RankPool
from tests.xla import runs
from tests.xla.llama import Seen

TOLERANCE = 2e-5
STEPS = 100
GRAPHS = {(1, 1): 3, (2, 1): 6, (1, 2): 15, (2, 2): 18}
"""Layout (dp, tp) -> graphs run in a step: forward and backward, the optimizer's step, what is logged; the emulation
cuts them at every collective."""


@pytest.fixture(scope="module")
def reference(host: RankPool) -> Seen:
    (seen,) = host.run(runs.layout, 1, STEPS, timeout=300)
    return seen


@pytest.mark.parametrize(
    ("dp", "tp"),
    [
        (1, 1),
        pytest.param(2, 1, marks=pytest.mark.slow),
        (1, 2),
        pytest.param(2, 2, marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_plain_pytorch(dp: int, tp: int, reference: Seen, request: Any) -> None:
    pool: RankPool = request.getfixturevalue(f"xla{dp * tp}")
    for seen in pool.run(runs.layout, tp, STEPS, timeout=600):
        assert len(seen.losses) == STEPS
        assert runs.deviation(seen.losses, reference.losses) < TOLERANCE
        assert runs.deviation(seen.norms, reference.norms) < 5 * TOLERANCE  # they add up every difference
        # counts[i] is what step i + 2 did
        assert [c["compiled"] for c in seen.counts[2:]] == [0] * (STEPS - 3)
        assert {c["run"] for c in seen.counts[2:]} == {GRAPHS[dp, tp]}
        assert all(c["reads"] == c["fallbacks"] == 0 for c in seen.counts)


def test_no_graph_after_step_3_through_saves_validations_logs_and_epochs(
    xla1: RankPool, tmp_path: Path
) -> None:
    """With a learning rate that passes through exactly 0.0 and 1.0."""
    ((seen, saves, rates, names),) = xla1.run(runs.everything, tmp_path, timeout=300)
    assert {0.0, 1.0} <= set(rates[3:])
    assert len(seen.val_losses) == 4  # the sanity check is one of them
    assert [c["compiled"] for c in seen.counts[2:]] == [0] * (len(seen.counts) - 2)
    assert len(saves) == 3
    assert all(save.compiled == 0 and save.transfers == 1 and save.run == 0 for save in saves)
    assert sorted(names) == ["epoch=1-step=15.ckpt", "epoch=3-step=30.ckpt", "epoch=5-step=45.ckpt"]


@pytest.mark.parametrize("accumulate", [2])
def test_accumulation_has_one_more_graph(xla1: RankPool, host: RankPool, accumulate: int) -> None:
    (seen,) = xla1.run(runs.layout, 1, 12, accumulate=accumulate, timeout=300)
    (expected,) = host.run(runs.layout, 1, 12, accumulate=accumulate, timeout=300)
    assert runs.deviation(seen.losses, expected.losses) < TOLERANCE
    assert [c["compiled"] for c in seen.counts[2:]] == [0] * 9


@pytest.mark.parametrize("zero1", [True, False])
def test_a_run_goes_on_bit_for_bit(xla1: RankPool, tmp_path: Path, zero1: bool) -> None:
    ((whole, resumed),) = xla1.run(runs.interrupted, tmp_path, 1, zero1, timeout=300)
    assert resumed.losses == whole.losses[6:]
    for name, weight in whole.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name


def test_ranks_with_slices_go_on_bit_for_bit(xla2: RankPool, tmp_path: Path) -> None:
    for whole, resumed in xla2.run(runs.interrupted, tmp_path, 1, True, timeout=300):
        assert resumed.losses == whole.losses[6:]
        for name, weight in whole.weights.items():
            assert torch.equal(weight, resumed.weights[name]), name


@pytest.mark.parametrize("to_xla", [True, False], ids=["cpu to xla", "xla to cpu"])
def test_a_checkpoint_goes_on_elsewhere(host: RankPool, xla2: RankPool, tmp_path: Path, to_xla: bool) -> None:
    """Written by one rank on one backend, read by another: two ranks with slices of the state on the other side."""
    first, second = (host, xla2) if to_xla else (xla2, host)
    first.run(runs.save_at, tmp_path, 6, timeout=300)
    resumed = second.run(runs.go_on, tmp_path, 12, timeout=300)[0]
    (expected,) = host.run(runs.layout, 1, 12, timeout=300)
    assert runs.deviation(resumed.losses, expected.losses[6:]) < TOLERANCE


def test_a_trial_run_of_the_compiler_saves_nothing_and_ends_by_itself(xla1: RankPool, tmp_path: Path) -> None:
    ((steps, saved),) = xla1.run(runs.trial, tmp_path, timeout=300)
    assert steps == 10
    assert saved == []


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_trains(xla1: RankPool, host: RankPool, precision: str) -> None:
    options = {"trainer_options": {"precision": precision}}
    (seen,) = xla1.run(runs.layout, 1, 10, timeout=300, **options)
    (expected,) = host.run(runs.layout, 1, 10, timeout=300, **options)
    assert runs.deviation(seen.losses, expected.losses) < 1e-2
    assert [c["compiled"] for c in seen.counts[2:]] == [0] * 7


def test_an_error_in_a_step_is_the_error_that_is_seen(xla1: RankPool) -> None:
    (error,) = xla1.run(runs.fails_in_a_step, timeout=300)
    assert error == "ZeroDivisionError: in the forward pass"


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", TOLERANCE), ("bf16-true", 1e-2)])
def test_a_rate_of_zero_changes_nothing_where_no_gradient_ever_was(
    xla1: RankPool, host: RankPool, precision: str, tolerance: float
) -> None:
    """torch's capturable classes divide by the learning rate."""
    (seen,) = xla1.run(runs.warms_up, precision, timeout=300)
    (expected,) = host.run(runs.warms_up, precision, timeout=300)
    assert runs.deviation(seen.losses, expected.losses) < tolerance
    for name, weight in expected.weights.items():
        assert torch.isfinite(seen.weights[name]).all(), name
        torch.testing.assert_close(
            seen.weights[name], weight, rtol=0, atol=2e-4 if tolerance < 1e-3 else 2e-2
        )
