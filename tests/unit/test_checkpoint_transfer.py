"""Reading in pieces: every element arrives once, in any layout of the target, and damage is found on the way."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuron_lightning.checkpoint import boxes, tensor_file, transfer
from neuron_lightning.checkpoint.boxes import Box
from neuron_lightning.checkpoint.manifest import FileRecord, StoredBox
from neuron_lightning.checkpoint.output import LocalSink, write_bytes
from neuron_lightning.checkpoint.storage import LocalFolder
from neuron_lightning.checkpoint.transfer import Want
from neuron_lightning.errors import CheckpointError

NAME = "f.safetensors"
SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@given(SHAPES, st.sampled_from([1, 2, 8]), st.integers(1, 100))
def test_pieces_are_contiguous_in_order_and_cover_everything(
    shape: tuple[int, ...], itemsize: int, limit: int
) -> None:
    order = torch.arange(math.prod(shape)).reshape(shape)
    seen = []
    for piece in transfer.pieces(shape, itemsize, limit):
        part = boxes.view(order, piece).reshape(-1)
        assert transfer._first(piece, shape) == part[0]
        assert part.numel() * itemsize <= max(limit, itemsize)
        seen.append(part)
    assert torch.equal(torch.cat(seen), order.reshape(-1))


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offset, extent = [], []
    for n in shape:
        start = draw(st.integers(0, n - 1))
        offset.append(start)
        extent.append(draw(st.integers(1, n - start)))
    return Box(tuple(offset), tuple(extent))


def store(folder: Path, tensors: dict[str, Tensor]) -> FileRecord:
    layout = tensor_file.Layout.of((k, t.dtype, t.shape) for k, t in tensors.items())
    data = [tensor_file.host_bytes(tensors[entry.key]) for entry in layout.entries]
    size, digest = write_bytes(LocalSink(folder / NAME), [layout.header, *data])
    assert digest == hashlib.sha256((folder / NAME).read_bytes()).hexdigest()
    return FileRecord("model", size, "sha256", digest)


def fetch(folder: Path, record: FileRecord, wants: list[Want], check: bool) -> int:
    counted: list[int] = []
    transfer.read(LocalFolder(folder), {NAME: record}, wants, [NAME] if check else [], counted.append, {})
    return sum(counted)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(), st.integers(1, 64))
def test_any_boxes_arrive_in_any_target(
    data: st.DataObject, dtype: torch.dtype, check: bool, limit: int
) -> None:
    shapes = data.draw(st.lists(SHAPES, min_size=1, max_size=3))
    tensors = {str(i): torch.randn(shape).to(torch.float32) for i, shape in enumerate(shapes)}
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "PIECE", limit)
        patch.setattr(transfer.pieces, "__defaults__", (limit,))
        record = store(Path(name), tensors)
        wants, expected = [], []
        for key, tensor in tensors.items():
            for _ in range(data.draw(st.integers(0, 2))):
                box = data.draw(boxes_in(tuple(tensor.shape)))
                into = torch.zeros(box.shape, dtype=dtype)
                if data.draw(st.booleans()) and into.dim() > 1:
                    into = torch.zeros(box.shape[::-1], dtype=dtype).permute(*reversed(range(into.dim())))
                stored = StoredBox(NAME, key, boxes.whole(tensor.shape))
                wants.append(Want(stored, torch.float32, box, into))
                expected.append(boxes.view(tensor, box).to(dtype))
        read = fetch(Path(name), record, wants, check)
        assert all(torch.equal(want.into, value) for want, value in zip(wants, expected, strict=True))
        if check:
            assert read == record.size


def test_of_a_file_that_is_not_checked_only_the_rows_that_are_wanted_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(40.0).reshape(10, 4), "b": torch.ones(1000)}
    record = store(tmp_path, tensors)
    want = Want(
        StoredBox(NAME, "a", boxes.whole((10, 4))), torch.float32, Box((3, 1), (2, 2)), torch.zeros(2, 2)
    )
    assert fetch(tmp_path, record, [want], check=False) == 2 * 4 * 4
    assert want.into.tolist() == [[13.0, 14.0], [17.0, 18.0]]


def test_a_tensor_larger_than_the_buffers_needs_no_more_memory(tmp_path: Path) -> None:
    tensor = torch.arange(6 * transfer.PIECE // 4, dtype=torch.int32).reshape(-1, 64)
    record = store(tmp_path, {"a": tensor})
    stored = StoredBox(NAME, "a", boxes.whole(tensor.shape))
    half = Box((0, 32), (tensor.shape[0], 32))
    want = Want(stored, torch.int32, half, torch.zeros(half.shape, dtype=torch.int32))
    sizes = []
    original = torch.empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda n, **k: sizes.append(n) or original(n, **k))
        fetch(tmp_path, record, [want], check=True)
    assert torch.equal(want.into, tensor[:, 32:])
    assert sum(sizes) <= transfer.EXTRA_BYTES


@pytest.mark.parametrize("check", [True, False])
def test_other_keys_shapes_and_dtypes_than_the_manifest_says_are_refused(tmp_path: Path, check: bool) -> None:
    record = store(tmp_path, {"a": torch.ones(3)})
    for key, dtype, shape in (
        ("b", torch.float32, (3,)),
        ("a", torch.int32, (3,)),
        ("a", torch.float32, (2,)),
    ):
        into = torch.zeros(shape, dtype=dtype)
        want = Want(StoredBox(NAME, key, boxes.whole(shape)), dtype, boxes.whole(shape), into)
        with pytest.raises(CheckpointError, match=f"{NAME}: {key} is .* but the manifest says"):
            fetch(tmp_path, record, [want], check)


def header(**changes: object) -> bytes:
    record = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return json.dumps({"a": record}).encode()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b'{"a": 1}',
        b"[" * 100_000,
        header(dtype="F33"),
        header(shape=[3]),
        header(shape=[-2]),
        header(shape=[2.0]),
        header(shape=2),
        header(data_offsets=[0, 4]),
        header(data_offsets=[8, 16]),
        header(data_offsets=[-8, 0]),
        header(data_offsets=[0]),
        header(shape=[1 << 70], data_offsets=[0, 4 << 70]),
        header(shape=[1], data_offsets=[0, 4]),
    ],
)
def test_headers_that_cannot_be_right_are_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / NAME).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with (
        LocalFolder(tmp_path).open(NAME) as reader,
        pytest.raises(CheckpointError, match="not a safetensors"),
    ):
        tensor_file.read_layout(reader)


@pytest.mark.parametrize(
    "raw", [b"", b"\0" * 7, b"\xff" * 8, struct.pack("<Q", 1 << 40), struct.pack("<Q", 9) + b"{}"]
)
def test_files_that_are_too_short_are_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / NAME).write_bytes(raw)
    with (
        LocalFolder(tmp_path).open(NAME) as reader,
        pytest.raises(CheckpointError, match="not a safetensors"),
    ):
        tensor_file.read_layout(reader)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32-le", "utf-8-sig"])
def test_a_header_in_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    store(tmp_path, {"a": torch.zeros(2)})
    text = (tmp_path / NAME).read_bytes()[8:-8].decode().encode(encoding)
    (tmp_path / NAME).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with (
        pytest.raises(CheckpointError, match="is not a safetensors file"),
        LocalFolder(tmp_path).open(NAME) as reader,
    ):
        tensor_file.read_layout(reader)
