"""The arithmetic of boxes: exact cover, no overlap, for any shapes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from neuron_lightning.checkpoint import boxes, manifest
from neuron_lightning.checkpoint.boxes import Box, Holding
from neuron_lightning.parallel.spec import ShardPart, ShardSpec, set_spec

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
    extent = tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))
    return Box(offset, extent)


def marked(shape: tuple[int, ...], found: list[Box]) -> torch.Tensor:
    counts = torch.zeros(shape, dtype=torch.int64)
    for box in found:
        boxes.view(counts, box).add_(1)
    return counts


@given(st.data())
def test_flat_range_is_covered_exactly_by_few_boxes(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    found = boxes.flat_boxes(shape, start, stop)
    expected = torch.zeros(numel, dtype=torch.int64)
    expected[start:stop] = 1
    assert torch.equal(marked(shape, found).reshape(-1), expected)
    assert len(found) <= max(1, 2 * len(shape) - 1)


@given(st.data())
def test_flat_view_shows_the_elements_of_the_box(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel - 1))
    stop = data.draw(st.integers(start + 1, numel))
    full = torch.arange(numel).reshape(shape)
    flat = torch.cat([torch.full((3,), -1), full.reshape(-1)[start:stop]])[3:]
    for box in boxes.flat_boxes(shape, start, stop):
        inner = data.draw(boxes_in(box.shape)).moved(box.offset)
        assert torch.equal(boxes.flat_view(flat, start, shape, inner), boxes.view(full, inner))


@given(st.data())
def test_subtract_and_cover_take_each_element_once(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    wanted = data.draw(boxes_in(shape))
    sources = data.draw(st.lists(boxes_in(shape), max_size=6))
    plan, missing = boxes.cover(wanted, sources)
    assert torch.equal(marked(shape, [box for _, box in plan] + missing), marked(shape, [wanted]))
    for index, box in plan:
        assert boxes.intersect(box, sources[index]) == box
    held = marked(shape, sources)
    assert not any(boxes.view(held, box).any() for box in missing)


@given(st.data())
def test_split_keeps_every_element(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    box = data.draw(boxes_in(shape))
    pieces = data.draw(st.integers(1, 7))
    cut = boxes.split(box, pieces)
    assert torch.equal(marked(shape, cut), marked(shape, [box]))
    assert len(cut) <= pieces


@given(st.data())
def test_assignment_writes_each_box_once_and_only_by_its_holders(data: st.DataObject) -> None:
    shape = (8, 6)
    pool = boxes.split(boxes.whole(shape), 4)
    ranks = data.draw(st.integers(1, 5))
    held: list[list[Holding]] = [[] for _ in range(ranks)]
    for name in ("a", "b", "c"):
        for box in pool:
            holders = data.draw(st.sets(st.integers(0, ranks - 1), min_size=1))
            for rank in holders:
                held[rank].append(Holding(name, box, 4 << 18, spread=name != "c"))
    work = boxes.assign(held)
    for name in ("a", "b", "c"):
        written = [box for items in work for n, box in items if n == name]
        assert torch.equal(marked(shape, written), torch.ones(shape, dtype=torch.int64))
    for rank, items in enumerate(work):
        for name, box in items:
            assert any(h.name == name and boxes.intersect(h.box, box) == box for h in held[rank])


def test_assignment_is_balanced_over_equal_holders() -> None:
    box = boxes.whole((1024, 1024))
    held = [[Holding(f"w{i}", box, 8) for i in range(5)] for _ in range(4)]
    sizes = [sum(b.numel * 8 for _, b in items) for items in boxes.assign(held)]
    assert sum(sizes) == 5 * box.numel * 8
    assert max(sizes) - min(sizes) <= boxes.CHUNK_BYTES


def test_buffers_are_written_by_the_lowest_rank() -> None:
    held = [[Holding("running_mean", boxes.whole((4,)), 4, spread=False)] for _ in range(3)]
    assert boxes.assign(held) == [[("running_mean", boxes.whole((4,)))], [], []]


def fused(rank: int) -> nn.Parameter:
    """Rows: 2 of q (of 4), 3 of k held by everyone, and one of padding."""
    param = nn.Parameter(torch.arange(12.0).reshape(6, 2))
    parts = (
        ShardPart(
            name="weight_q",
            global_shape=(4, 2),
            global_offset=(2 * rank, 0),
            shape=(2, 2),
            local_offset=(0, 0),
            local_rows=2,
        ),
        ShardPart(
            name="weight_k",
            global_shape=(3, 2),
            global_offset=(0, 0),
            shape=(3, 2),
            local_offset=(2, 0),
            local_rows=4,
            replicas=2,
        ),
    )
    set_spec(param, ShardSpec(parts=parts))
    return param


def test_a_fused_padded_parameter_becomes_boxes_of_canonical_tensors() -> None:
    places = boxes.placements("layer.qkv.weight_qkv", fused(1), 2)
    assert [p.name for p in places] == ["layer.qkv.weight_q", "layer.qkv.weight_k"]
    assert places[0].box == Box((2, 0), (2, 2))
    assert places[1].local == Box((2, 0), (3, 2))


@pytest.mark.parametrize("cut", range(13))
def test_a_flat_cut_of_a_fused_parameter_loses_nothing_but_padding(cut: int) -> None:
    param = fused(1)
    flat = param.detach().reshape(-1)
    rebuilt = {"q": torch.full((4, 2), -1.0), "k": torch.full((3, 2), -1.0)}
    for start, stop in ((0, cut), (cut, 12)):
        for place in boxes.flat_placements("q.weight_qkv", param, 2, start, stop):
            part = boxes.flat_view(flat[start:stop], start, (6, 2), place.local)
            boxes.view(rebuilt[place.name[-1]], place.box).copy_(part)
    assert torch.equal(rebuilt["q"][2:], param[:2])
    assert torch.equal(rebuilt["q"][:2], torch.full((2, 2), -1.0))
    assert torch.equal(rebuilt["k"], param[2:5])


@given(st.data(), st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
def test_slabs_are_taken_for_a_cover_only_if_they_are_one(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    edges = sorted(data.draw(st.sets(st.integers(0, shape[axis]))) | {0, shape[axis]})
    slabs = [
        Box(
            tuple(start if d == axis else 0 for d in range(len(shape))),
            tuple(stop - start if d == axis else n for d, n in enumerate(shape)),
        )
        for start, stop in itertools.pairwise(edges)
    ]
    slabs = data.draw(st.permutations(slabs))
    assert manifest._are_slabs(slabs, shape)
    if change := data.draw(st.sampled_from(["", "drop", "double", "move", "shrink"])):
        index = data.draw(st.integers(0, len(slabs) - 1))
        box, d = slabs[index], data.draw(st.integers(0, len(shape) - 1))
        nudged = tuple(o + (i == d) for i, o in enumerate(box.offset))
        smaller = tuple(n - (i == d) for i, n in enumerate(box.shape))
        news = {"drop": [], "double": [box, box], "move": [Box(nudged, box.shape)]}
        news["shrink"] = [Box(box.offset, smaller)]
        slabs[index : index + 1] = news[change]
        assert not manifest._are_slabs(slabs, shape)
