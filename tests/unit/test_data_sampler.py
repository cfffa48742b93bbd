"""The sampler's order: every id exactly once, over any ranks and across any stop and restart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_lightning.data import PositionalSampler
from neuron_lightning.data.shuffle import Permutation
from neuron_lightning.errors import ConfigError, DataError

PINNED = [8, 9, 5, 0, 3, 7, 1, 4, 6, 2]


def _samplers(size: int, ranks: int, **kwargs: object) -> list[PositionalSampler]:
    return [PositionalSampler(range(size), num_replicas=ranks, rank=r, **kwargs) for r in range(ranks)]  # type: ignore[arg-type]


def _consumed(samplers: list[PositionalSampler]) -> list[int]:
    """Ids in the order in which all ranks together consume them."""
    return [i for step in zip(*samplers, strict=True) for i in step]


@settings(deadline=None, max_examples=80)
@given(size=st.integers(1, 3000), key=st.text(max_size=8))
def test_permutation_hits_every_id_once(size: int, key: str) -> None:
    ids = Permutation(size, key)(np.arange(size, dtype=np.int64))
    assert sorted(ids.tolist()) == list(range(size))


def test_permutation_reads_any_place_of_a_huge_range() -> None:
    permutation = Permutation(10**12, "seed")
    places = np.asarray([0, 5, 10**12 - 1])
    assert permutation(places).tolist() == [int(permutation(places[i : i + 1])[0]) for i in range(3)]
    assert all(0 <= i < 10**12 for i in permutation(places))


def test_permutation_is_pinned() -> None:
    """Changing the order silently would break every resume: these ids may never change."""
    assert Permutation(10, "1234/0")(np.arange(10)).tolist() == PINNED


def test_shuffle_is_not_close_to_the_identity() -> None:
    ids = np.asarray(_samplers(10_000, 1, seed=7)[0].order(0, 10_000))
    assert abs(np.corrcoef(ids, np.arange(10_000))[0, 1]) < 0.05
    assert np.count_nonzero(ids == np.arange(10_000)) < 10


@settings(deadline=None, max_examples=80)
@given(
    size=st.integers(1, 400), ranks=st.integers(1, 6), seed=st.integers(0, 2**31), epoch=st.integers(0, 50)
)
def test_every_id_exactly_once_over_ranks(size: int, ranks: int, seed: int, epoch: int) -> None:
    if size < ranks:
        return
    samplers = _samplers(size, ranks, seed=seed)
    for sampler in samplers:
        sampler.set_epoch(epoch)
    ids = [i for sampler in samplers for i in sampler]
    assert len(ids) == len(set(ids)) == size - size % ranks
    assert set(ids) <= set(range(size))
    assert {len(s) for s in samplers} == {size // ranks}


@settings(deadline=None, max_examples=80)
@given(
    data=st.data(),
    groups=st.integers(1, 40),
    before=st.sampled_from([1, 2, 3]),
    after=st.sampled_from([1, 2, 6]),
)
def test_resume_at_any_position_under_other_ranks(
    data: st.DataObject, groups: int, before: int, after: int
) -> None:
    size = groups * 6
    first = _samplers(size, before, seed=3)
    for sampler in first:
        sampler.set_epoch(2)
    whole = _consumed(first)
    position = data.draw(st.integers(0, size // (before * after))) * before * after
    position = min(position, size)
    first[0].position = position
    second = _samplers(size, after, seed=3)
    for sampler in second:
        sampler.load_state_dict(first[0].state_dict())
        sampler.set_epoch(2)
    assert whole[:position] + _consumed(second) == whole
    assert sorted(whole) == list(range(size))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = PositionalSampler(range(50), num_replicas=1, rank=0, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_length_stays_the_whole_epochs_and_the_next_epoch_starts_at_its_beginning() -> None:
    sampler = PositionalSampler(range(20), num_replicas=2, rank=0)
    sampler.position = 6
    assert len(sampler) == 10
    assert len(list(sampler)) == 7
    sampler.set_epoch(1)
    assert sampler.position == 0
    assert len(list(sampler)) == 10


def test_a_group_makes_the_epoch_the_same_for_every_layout() -> None:
    by_layout = {ranks: _consumed(_samplers(43, ranks, seed=5, group_size=8)) for ranks in (1, 2, 4)}
    assert by_layout[1] == by_layout[2] == by_layout[4]
    assert len(by_layout[1]) == 40


def test_without_shuffling_the_order_is_the_datasets() -> None:
    assert _consumed(_samplers(6, 2, shuffle=False)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"num_replicas": 2, "rank": 2}, "rank 2 of 2 replicas"),
        ({"num_replicas": 2, "rank": 0, "group_size": 3}, "multiple of the 2 replicas"),
    ],
)
def test_bad_arguments(kwargs: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PositionalSampler(range(10), **kwargs)  # type: ignore[arg-type]


def test_too_few_samples() -> None:
    with pytest.raises(DataError, match="3 samples are fewer than one global batch of 4"):
        PositionalSampler(range(3), num_replicas=4, rank=0)


def test_bad_position_and_foreign_state() -> None:
    sampler = PositionalSampler(range(10), num_replicas=2, rank=0, seed=1)
    for position in (-2, 3, 12):
        with pytest.raises(ConfigError, match=f"position {position}"):
            sampler.position = position
    with pytest.raises(ConfigError, match="saved order has seed 2, this run has 1"):
        sampler.load_state_dict({**sampler.state_dict(), "seed": 2})
    with pytest.raises(ConfigError, match="num_samples 11, this run has 10"):
        sampler.load_state_dict({**sampler.state_dict(), "num_samples": 11})
