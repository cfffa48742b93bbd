"""Plans, clipping, regions, autocast, compilation, randomness: around the parallel layers."""

from __future__ import annotations

import math

import pytest
import torch

from neuron_lightning.testing import RankPool
from tests.dist import plan_ranks as ranks
from tests.dist.layer_ranks import on_mesh


@pytest.fixture(params=[2, 4])
def run(request: pytest.FixtureRequest):
    """Runs a function on a tensor-parallel group of 2 and of 4 ranks."""
    pool: RankPool = request.getfixturevalue(f"pool{request.param}")
    return lambda fn, *args: pool.run(on_mesh, request.param, fn, *args)


def test_regions(run):
    run(ranks.check_regions)


def test_a_plan_on_an_mlp(run):
    run(ranks.check_mlp)


def test_a_plan_with_sequence_parallel(run):
    run(ranks.check_mlp_sequence_parallel)


def test_a_plan_on_meta_gives_the_weights_of_one_rank(run, pool1):
    (one,) = pool1.run(on_mesh, 1, ranks.check_mlp_on_meta)
    for found in run(ranks.check_mlp_on_meta):
        for name, boxes in found.items():
            for (_, offset, values), (_, _, full) in zip(boxes, one[name], strict=True):
                where = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
                assert torch.equal(values, full[where]), name


@pytest.mark.parametrize(("kind", "tie"), [("Llama", False), ("Llama", True), ("Qwen3", True)])
def test_hugging_faces_own_plan(pool2, kind, tie):
    pytest.importorskip("transformers")
    pool2.run(on_mesh, 2, ranks.check_hugging_face, tie, kind)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("norm_type", "max_norm"), [(2, 0.5), (2, 1e9), (1, 0.5), (math.inf, 0.5)])
@pytest.mark.parametrize("tp", [2, 4])
def test_clipping_counts_each_element_once(request, pool1, tp, norm_type, max_norm, sequence):
    pool: RankPool = request.getfixturevalue(f"pool{tp}")
    ((norm_one, one),) = pool1.run(ranks.clip_by_torch, norm_type, max_norm)
    for norm, found in pool.run(ranks.clip, tp, tp, sequence, norm_type, max_norm):
        assert abs(norm - norm_one) <= 1e-12 * norm_one
        assert norm.dtype == torch.float64
        for (name, offset), grad in found.items():
            where = tuple(slice(o, o + n) for o, n in zip(offset, grad.shape, strict=True))
            assert (grad - one[name][where]).abs().max() <= 1e-12, name


def test_partial_output_and_skipped_bias(run):
    run(ranks.check_partial_and_skipped_bias)


@pytest.mark.parametrize(
    ("activations", "reduce_dtype", "expected"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.bfloat16, torch.float32),
    ],
)
def test_sums_are_formed_in_reduce_dtype_and_never_in_a_narrower_one(
    pool2, activations, reduce_dtype, expected
):
    for seen in pool2.run(on_mesh, 2, ranks.check_reduce_dtype, activations, reduce_dtype):
        assert seen == {expected}


@pytest.mark.parametrize("sequence", [False, True])
def test_autocast(run, sequence):
    run(ranks.check_autocast, sequence)


def test_frozen_weights(run):
    run(ranks.check_frozen_weights)


@pytest.mark.parametrize("sequence", [False, True])
def test_compiles_in_one_graph(pool2, sequence):
    pool2.run(on_mesh, 2, ranks.check_compile, sequence)


def test_sequence_parallel_keeps_only_its_part(pool2):
    assert pool2.run(on_mesh, 2, ranks.check_only_the_local_sequence_is_kept) == [4 * 3 * 6] * 2


def test_random_streams(pool4):
    drawn = pool4.run(ranks.streams, 2)  # dp 2 x tp 2, tensor fastest
    for name in ("outside", "after"):
        assert drawn[0][name] == drawn[1][name]
        assert drawn[2][name] == drawn[3][name]
        assert drawn[0][name] != drawn[2][name]
    inside = [tuple(d[name]) for d in drawn for name in ("first", "second")]
    assert len(set(inside)) == 8


def test_activation_checkpointing_repeats_the_dropout_of_every_region(run):
    run(ranks.check_checkpointing_repeats_dropout)


def test_no_collective_at_one_rank(pool1):
    pytest.importorskip("transformers")
    pool1.run(on_mesh, 1, ranks.check_no_collective_at_one_rank)
