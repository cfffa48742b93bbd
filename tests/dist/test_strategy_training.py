"""A plain LightningModule under the strategy against Lightning's own single-process run, in float64."""

from __future__ import annotations

import pytest

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
