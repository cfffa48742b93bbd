"""Every parallel layer equals torch's own, outputs and all gradients, in float64 at tp 2 and 4."""

from __future__ import annotations

import itertools

import pytest
import torch

from neuron_lightning.testing import RankPool
from tests.dist import layer_ranks as ranks


@pytest.fixture(params=[2, 4])
def run(request: pytest.FixtureRequest):
    """Runs a function on a tensor-parallel group of 2 and of 4 ranks."""
    pool: RankPool = request.getfixturevalue(f"pool{request.param}")
    return lambda fn, *args: pool.run(ranks.on_mesh, request.param, fn, *args)


COLUMN = [
    pytest.param(g, s, b, stride, out, pad, id=f"gather{g:d}-seq{s}-bias{b:d}-{stride}x{out // stride}")
    for g, s, b, (stride, out, pad) in itertools.product(
        [False, True],
        [None, 0, 1],
        [False, True],
        [(1, 8, False), (2, 16, False), (1, 7, True), (2, 10, True), (3, 3, True)],
    )
    if b or s != 1
]


@pytest.mark.parametrize(("gather", "sequence", "bias", "stride", "out", "pad"), COLUMN)
def test_column(run, gather, sequence, bias, stride, out, pad):
    run(ranks.check_column, gather, sequence, bias, stride, out, pad)


@pytest.mark.parametrize(("size", "pad"), [(8, False), (7, True), (1, True)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("parallel_input", "sequence"), [(True, None), (False, None), (True, 0), (True, 1)])
def test_row(run, parallel_input, sequence, bias, size, pad):
    run(ranks.check_row, parallel_input, sequence, bias, size, pad)


@pytest.mark.parametrize("sequence", [None, 0, 1])
@pytest.mark.parametrize(
    ("across", "vocab", "dim", "pad", "padding_idx"),
    [
        (False, 12, 5, False, None),
        (False, 12, 5, False, 0),
        (False, 11, 5, True, -1),
        (True, 11, 8, False, 3),
        (True, 11, 7, True, None),
    ],
)
def test_embedding(run, sequence, across, vocab, dim, pad, padding_idx):
    run(ranks.check_embedding, sequence, across, vocab, dim, pad, padding_idx)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("gather", "sequence"), [(False, False), (False, True), (True, False)])
def test_qkv_with_a_head_for_every_rank(run, gather, sequence, bias, fuse):
    run(ranks.check_qkv, gather, sequence, bias, 4, 1, fuse)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(("gather", "sequence"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(("tp", "kv_heads", "multiplier"), [(2, 1, 2), (4, 2, 2), (4, 1, 4)])
def test_qkv_with_shared_key_value_heads(request, tp, kv_heads, multiplier, gather, sequence, fuse):
    pool = request.getfixturevalue(f"pool{tp}")
    pool.run(ranks.on_mesh, tp, ranks.check_qkv, gather, sequence, True, kv_heads, multiplier, fuse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("vocab", "padded"), [(12, 12), (11, 12), (5, 12)])
def test_loss(run, smoothing, vocab, padded, dtype):
    run(ranks.check_loss, smoothing, vocab, padded, dtype)


def test_a_target_outside_the_vocabulary_shows_in_the_loss(run):
    for result in run(ranks.check_bad_target_is_nan):
        assert result == [False, True, True]
