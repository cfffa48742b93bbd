"""A plain LightningModule under the strategy against Lightning's own single-process run, in float64."""

from __future__ import annotations

import pytest
import torch

from tests.dist import strategy_cases as cases

LIMIT = 1e-10


@pytest.mark.parametrize("zero1", [False, True])
def test_automatic_optimization_equals_lightnings_own(pool2, zero1):
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}
    expected = cases.reference(cases.Mlp, **options)
    for got in pool2.run(cases.rank_fit, cases.Mlp, {"zero1": zero1}, **options):
        assert cases.worst(got, expected) <= LIMIT


def test_clipping_by_value_equals_lightnings_own(pool2):
    options = {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value", "micro_batches": 1}
    expected = cases.reference(cases.Mlp, **options)
    for got in pool2.run(cases.rank_fit, cases.Mlp, {"zero1": True}, **options):
        assert cases.worst(got, expected) <= LIMIT


def test_manual_optimization_with_bare_backward_equals_lightnings_own(pool2):
    expected = cases.reference(cases.ManualMlp)
    for got in pool2.run(cases.rank_fit, cases.ManualMlp, {"zero1": True}):
        assert cases.worst(got, expected) <= LIMIT


def test_a_tensor_parallel_plan_equals_lightnings_own(pool2):
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}
    expected = cases.reference(cases.Mlp, **options)
    plan = {"up": "column", "down": "row"}
    strategy = {"tensor_parallel_size": 2, "tp_plan": plan, "zero1": True}
    ranks = pool2.run(cases.rank_fit, cases.Mlp, strategy, **options)
    whole = {
        "up.weight": torch.cat([r["up.weight"] for r in ranks]),
        "up.bias": torch.cat([r["up.bias"] for r in ranks]),
        "down.weight": torch.cat([r["down.weight"] for r in ranks], dim=1),
        **{name: ranks[0][name] for name in ("down.bias", "unused")},
    }
    assert cases.worst(whole, expected) <= LIMIT


def test_a_module_that_is_built_in_configure_model(pool2):
    """Parallel layers are drawn by name: the same weights on every layout, and no two ranks differ."""
    one = pool2.run(cases.rank_built, 1)
    two = pool2.run(cases.rank_built, 2)
    assert all(torch.equal(a["up.weight"], one[0]["up.weight"]) for a in one)
    assert torch.equal(torch.cat([r["up.weight"] for r in two]), one[0]["up.weight"])
