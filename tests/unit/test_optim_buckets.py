"""Bucket layouts: every element exactly once, in every slicing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_lightning.errors import OptimizerError
from neuron_lightning.optim.buckets import ALIGNMENT, BucketLayout, check_spec, plan_buckets, runs_of
from neuron_lightning.optim.norm import clip_coefficient, weighted_square_sum
from neuron_lightning.parallel.spec import ShardPart, ShardSpec

numels = st.lists(st.integers(0, 700), min_size=1, max_size=20)


@given(numels, st.integers(1, 1000), st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_pieces_cover_every_element_once(sizes: list[int], max_numel: int, num_slices: int) -> None:
    layouts = plan_buckets(sizes, max_numel=max_numel, num_slices=num_slices)
    owned = [[0] * size for size in sizes]
    for layout in layouts:
        assert layout.size % (num_slices * ALIGNMENT) == 0
        used: set[int] = set()
        for rank in range(num_slices):
            low, high = layout.slice_bounds(rank)
            for piece in layout.pieces(rank):
                span = range(piece.offset, piece.offset + piece.stop - piece.start)
                assert low <= span.start
                assert span.stop <= high
                assert used.isdisjoint(span)
                used.update(span)
                for element in range(piece.start, piece.stop):
                    owned[piece.param][element] += 1
    assert all(count == 1 for counts in owned for count in counts)


@given(numels, st.integers(1, 1000), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_buckets_keep_order_alignment_and_size(sizes: list[int], max_numel: int, num_slices: int) -> None:
    layouts = plan_buckets(sizes, max_numel=max_numel, num_slices=num_slices)
    order = [slot.param for layout in layouts for slot in layout.slots]
    assert order == [index for index, size in enumerate(sizes) if size]
    for layout in layouts:
        assert all(slot.offset % ALIGNMENT == 0 for slot in layout.slots)
        last = layout.slots[-1]
        assert len(layout.slots) == 1 or last.offset + last.numel <= max_numel
        assert layout.size - (last.offset + last.numel) < num_slices * ALIGNMENT


def _part(rows: int, replicas: int = 1, grad_ranks: int = 1) -> ShardPart:
    return ShardPart(
        global_shape=(rows, 3),
        global_offset=(0, 0),
        shape=(rows, 3),
        local_offset=(0, 0),
        local_rows=rows,
        replicas=replicas,
        grad_ranks=grad_ranks,
    )


def test_runs_are_cut_where_the_treatment_changes_and_joined_where_it_does_not() -> None:
    fused = ShardSpec(parts=(_part(4), _part(2, 2, 2), _part(2, 2, 2)))
    plain = ShardSpec(parts=(_part(5, 4),))
    layout: BucketLayout = plan_buckets([24, 15, 15], max_numel=10**6, num_slices=1)[0]
    runs = runs_of(layout.pieces(0), [(fused, 3), (plain, 3), (plain, 3)])
    assert runs == [(0, 12, 1, 1), (12, 24, 2, 2), (64, 143, 4, 1)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_runs_of_all_slices_add_up(rows: list[int], row_numel: int, num_slices: int) -> None:
    spec = ShardSpec(parts=tuple(_part(r, replicas=1 + i % 2) for i, r in enumerate(rows)))
    layout = plan_buckets([sum(rows) * row_numel], max_numel=10**6, num_slices=num_slices)[0]
    found = {1: 0, 2: 0}
    for rank in range(num_slices):
        for run in runs_of(layout.pieces(rank), [(spec, row_numel)]):
            found[run.replicas] += run.stop - run.start
    assert found == {1: sum(rows[0::2]) * row_numel, 2: sum(rows[1::2]) * row_numel}


def test_a_spec_that_does_not_cover_its_parameter_is_refused() -> None:
    with pytest.raises(OptimizerError, match=r"cover 4.*\(5, 3\).*has 5"):
        check_spec(ShardSpec(parts=(_part(4),)), (5, 3), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norm_of_many_equal_elements_is_exact_where_one_accumulator_is_not(dtype: torch.dtype) -> None:
    x = torch.full((3 * 10**6 + 17,), 0.1).to(dtype)
    zero = torch.zeros((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    ours = weighted_square_sum([(x, 0.5), (x[:5], 2.0)], zero)
    exact = 0.5 * x.double().square().sum() + 2.0 * x[:5].double().square().sum()
    assert abs(ours.double() / exact - 1) < 3e-6
    assert ours.dtype == zero.dtype


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clip_coefficient_is_that_of_torch(scale: float) -> None:
    grad = scale * torch.randn(50, generator=torch.Generator().manual_seed(1))
    param = torch.nn.Parameter(torch.zeros(50))
    param.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_([param], 0.7)
    assert torch.equal(param.grad, grad * clip_coefficient(norm, 0.7))
