"""Saving and resuming at another layout need a constant amount of memory beside the state, and lose nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuron_lightning.checkpoint.transfer import EXTRA_BYTES
from tools.memory_checkpoint import MIB, Size, measure

SLACK = 24 * MIB
"""For what Python and its threads take meanwhile."""


@pytest.mark.parametrize(("save_tp", "load_tp"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_a_reshard_needs_a_constant_amount_of_memory(tmp_path: Path, save_tp: int, load_tp: int) -> None:
    size = Size(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8, vocab_size=8000
    )
    result = measure(size, str(tmp_path), save_tp, load_tp)
    assert result.different == []
    assert result.state > 6 * (EXTRA_BYTES + SLACK)
    assert result.state <= result.disk < 1.01 * result.state
    for report in result.resumed:
        for name in ("load weights", "load optimizer"):
            assert report.usages[name].extra < EXTRA_BYTES + SLACK, (name, report)
    for report in (*result.saved, *result.resumed):
        assert report.usages["save"].extra < EXTRA_BYTES + SLACK, report
