"""The guard names what made a step compile, with its line."""

from __future__ import annotations

import pytest

from neuron_lightning.testing import RankPool
from tests.xla import guarded


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (guarded.Shortens, "(8, 12)"),
        (guarded.ChangesANumber, "the Python number 1.0, it was 0.5"),
    ],
)
def test_a_single_cause_is_named_where_operators_are_recorded(xla1: RankPool, kind: type, words: str) -> None:
    ((number, reports, _),) = xla1.run(guarded.guarded, kind, locate=True)
    assert number >= 1
    assert f"step {guarded.STEP} compiled" in reports[0]
    assert f"guarded.py:{guarded.line_of(kind)} in forward" in reports[0]
    assert words in reports[0]


@pytest.mark.parametrize(("kind", "words"), [(guarded.Reads, ".item()"), (guarded.Branches, "a truth value")])
def test_a_read_is_named_without_recording(xla1: RankPool, kind: type, words: str) -> None:
    ((_, reports, _),) = xla1.run(guarded.guarded, kind)
    assert len(reports) == 1
    assert f"guarded.py:{guarded.line_of(kind)} in forward: {words}" in reports[0]


def test_a_repeated_cause_is_named_from_the_second_time_on(xla1: RankPool) -> None:
    ((number, reports, _),) = xla1.run(guarded.guarded, guarded.CountsOn)
    assert number >= 2
    assert "not recorded" in reports[0]
    assert f"guarded.py:{guarded.line_of(guarded.CountsOn)} in forward" in reports[-1]


def test_too_many_stop_the_run(xla1: RankPool) -> None:
    ((number, _, said),) = xla1.run(guarded.guarded, guarded.CountsOnFurther, max_recompiles=1, locate=True)
    assert number == 2
    assert "2 graph(s) were compiled after the first 3 steps, max_recompiles is 1" in said
    assert f"guarded.py:{guarded.line_of(guarded.CountsOn)}" in said


def test_a_steady_run_is_left_alone(xla1: RankPool) -> None:
    ((number, reports, seen),) = xla1.run(guarded.guarded, guarded.Slice, max_recompiles=0)
    assert (number, reports) == (0, [])
    assert len(seen.losses) == 10


def test_it_is_there_by_itself(xla1: RankPool) -> None:
    assert "RecompileGuard" in xla1.run(guarded.by_itself)[0]
