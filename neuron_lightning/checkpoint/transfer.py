"""Reads stored boxes into local tensors: each file once, front to back, hashed on the way.

A file is read in pieces that are contiguous in it. A piece that a local tensor takes as it is goes straight into that
tensor's memory; any other one passes through one of a few buffers, from which each local tensor takes its elements.
The hash runs in a second thread, so that disk, copying and hashing work at the same time, and the memory that a
load needs beside the tensors themselves is :data:`EXTRA_BYTES`, whatever the size of the model.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from torch import Tensor

from neuron_lightning.checkpoint import boxes, tensor_file
from neuron_lightning.checkpoint.boxes import Box
from neuron_lightning.checkpoint.manifest import FileRecord, StoredBox
from neuron_lightning.checkpoint.output import Hasher
from neuron_lightning.checkpoint.storage import FileReader, Folder
from neuron_lightning.checkpoint.tensor_file import Entry, Layout
from neuron_lightning.errors import CheckpointError

PIECE = 8 << 20
"""Largest number of bytes that are read at a time (one row of a tensor, if that is larger)."""
_BUFFERS = 4
EXTRA_BYTES = PIECE * _BUFFERS
"""Host memory of a load, beside the tensors that are loaded."""

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Want:
    """Elements that a local tensor takes from a stored box.

    Attributes:
        stored: the stored box, of elements of ``dtype``.
        dtype: as it is stored; converted if the local tensor has another one.
        box: the elements, counted from where the stored box starts.
        into: where they go; of the shape of ``box``, on any device, in any memory format.
    """

    stored: StoredBox
    dtype: torch.dtype
    box: Box
    into: Tensor

    @property
    def size(self) -> int:
        """Bytes to read for it."""
        return self.box.numel * self.dtype.itemsize


def read(
    folder: Folder,
    files: Mapping[str, FileRecord],
    wants: Sequence[Want],
    verified: Collection[str],
    on_bytes: OnBytes,
    layouts: dict[str, Layout],
) -> None:
    """Copies what is wanted, and checks the hashes of the files ``verified`` on the way.

    Args:
        folder: where the files are.
        files: their records in the manifest.
        wants: what to copy, and where to.
        verified: files that are read as a whole and checked, wanted or not.
        on_bytes: called with the number of bytes after each piece.
        layouts: by file, those known from earlier reads; new ones are added.

    Raises:
        CheckpointError: a file is damaged or not what the manifest says. The tensors may be half changed then.
    """
    by_file: dict[str, list[Want]] = defaultdict(list)
    for want in wants:
        by_file[want.stored.file].append(want)
    buffers = _Buffers()
    whole = sorted(verified, key=lambda name: (-files[name].size, name))
    for name in [*whole, *sorted(by_file.keys() - set(whole))]:
        with folder.open(name) as reader:
            if reader.size != files[name].size:
                raise damaged_size(reader.where, reader.size, files[name].size)
            file = _File(reader, by_file[name], buffers, on_bytes)
            if name in whole:
                file.read_and_check(files[name], name.endswith(".safetensors"))
            else:
                file.read_wanted(
                    layouts.get(name) or layouts.setdefault(name, tensor_file.read_layout(reader))
                )


def damaged_size(where: str, found: int, expected: int) -> CheckpointError:
    """The error for a file of another size than its record."""
    return CheckpointError(
        f"{where} has {found} bytes, the manifest says {expected}: the checkpoint is damaged; use another one."
    )


class _Buffers:
    """Host memory that pieces pass through; a buffer is free again when the hash has seen it."""

    def __init__(self) -> None:
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(torch.empty(0, dtype=torch.uint8, device="cpu"))

    def take(self, size: int) -> Tensor:
        """A buffer of at least ``size`` bytes."""
        buffer = self._free.get()
        return (
            buffer
            if buffer.numel() >= size
            else torch.empty(max(size, PIECE), dtype=torch.uint8, device="cpu")
        )

    def give(self, buffer: Tensor) -> None:
        """Takes a buffer back."""
        self._free.put(buffer)


class _File:
    """The reading of one file."""

    def __init__(
        self, reader: FileReader, wants: Sequence[Want], buffers: _Buffers, on_bytes: OnBytes
    ) -> None:
        self._reader = reader
        self._wants: dict[str, list[Want]] = defaultdict(list)
        for want in wants:
            self._wants[want.stored.key].append(want)
        self._buffers = buffers
        self._on_bytes = on_bytes
        self._hash: Hasher | None = None

    def read_wanted(self, layout: Layout) -> None:
        """Reads what is wanted, and no more."""
        self._check(layout)
        for entry in layout.entries:
            if wants := self._wants.get(entry.key):
                self._read_entry(len(layout.header) + entry.offset, entry, wants)

    def read_and_check(self, record: FileRecord, tensors: bool) -> None:
        """Reads everything, copies what is wanted, and compares the hash."""
        self._hash = Hasher(record.algorithm)
        try:
            if tensors:
                self._read_all(self._hash)
            else:
                self._skim(0, self._reader.size)
        finally:
            digest = self._hash.close()
        if digest != record.hash:
            raise CheckpointError(
                f"{self._reader.where} does not match its hash in the manifest: the file is damaged; use another "
                "checkpoint."
            )

    def _read_all(self, digest: Hasher) -> None:
        layout = tensor_file.read_layout(self._reader)
        digest.update(memoryview(layout.header))
        self._on_bytes(len(layout.header))
        self._check(layout)
        for entry in layout.entries:
            start = len(layout.header) + entry.offset
            if wants := self._wants.get(entry.key):
                self._read_entry(start, entry, wants)
            else:
                self._skim(start, entry.size)

    def _check(self, layout: Layout) -> None:
        found = {entry.key: (entry.dtype, entry.shape) for entry in layout.entries}
        for key, wants in self._wants.items():
            expected = (wants[0].dtype, wants[0].stored.box.shape)
            if found.get(key) != expected:
                raise CheckpointError(
                    f"{self._reader.where}: {key} is {found.get(key, 'missing')}, but the manifest says {expected}: the "
                    "file is damaged; use another checkpoint."
                )

    def _read_entry(self, start: int, entry: Entry, wants: Sequence[Want]) -> None:
        for piece in pieces(entry.shape, entry.dtype.itemsize):
            parts = [(want, common) for want in wants if (common := boxes.intersect(want.box, piece))]
            if self._hash is None:
                if not parts:
                    continue
                piece = _rows(piece, [common for _, common in parts])
            offset = start + _first(piece, entry.shape) * entry.dtype.itemsize
            self._read_piece(offset, piece, entry.dtype, parts)

    def _read_piece(
        self, offset: int, piece: Box, dtype: torch.dtype, parts: Sequence[tuple[Want, Box]]
    ) -> None:
        size = piece.numel * dtype.itemsize
        if direct := _direct(piece, dtype, parts):
            self._fill(offset, direct, None)
        else:
            buffer = self._buffers.take(size)
            raw = buffer[:size]
            self._reader.read_into(offset, tensor_file.host_bytes(raw))
            data = raw.view(dtype).view(piece.shape)
            for want, common in parts:
                _part(want.into, common.within(want.box)).copy_(_part(data, common.within(piece)))
            self._seen(tensor_file.host_bytes(raw), buffer)
        self._on_bytes(size)

    def _fill(self, offset: int, data: memoryview, buffer: Tensor | None) -> None:
        self._reader.read_into(offset, data)
        self._seen(data, buffer)

    def _skim(self, start: int, size: int) -> None:
        """Reads for the hash alone."""
        for offset in range(start, start + size, PIECE):
            count = min(PIECE, start + size - offset)
            buffer = self._buffers.take(count)
            self._fill(offset, tensor_file.host_bytes(buffer[:count]), buffer)
            self._on_bytes(count)

    def _seen(self, data: memoryview, buffer: Tensor | None) -> None:
        """Hands data to the hash; ``buffer`` is free afterwards."""
        free = None if buffer is None else lambda: self._buffers.give(buffer)
        if self._hash is not None:
            self._hash.update(data, free)
        elif free is not None:
            free()


def pieces(shape: Sequence[int], itemsize: int, limit: int = PIECE) -> Iterator[Box]:
    """Cuts a row-major tensor into boxes that are contiguous in it, in order, of at most ``limit`` bytes each."""
    size = math.prod(shape) * itemsize
    if size <= limit or not shape:
        if size:
            yield boxes.whole(shape)
        return
    row, rest = size // shape[0], (0,) * (len(shape) - 1)
    if row <= limit:
        step = limit // row
        for start in range(0, shape[0], step):
            yield Box((start, *rest), (min(step, shape[0] - start), *shape[1:]))
        return
    for index in range(shape[0]):
        for inner in pieces(shape[1:], itemsize, limit):
            yield Box((index, *inner.offset), (1, *inner.shape))


def _rows(piece: Box, parts: Sequence[Box]) -> Box:
    """The smallest contiguous part of a piece that holds ``parts``: fewer rows of it."""
    d = next((i for i, extent in enumerate(piece.shape) if extent > 1), None)
    if d is None:
        return piece
    start = min(part.offset[d] for part in parts)
    stop = max(part.offset[d] + part.shape[d] for part in parts)
    return Box(
        (*piece.offset[:d], start, *piece.offset[d + 1 :]),
        (*piece.shape[:d], stop - start, *piece.shape[d + 1 :]),
    )


def _first(piece: Box, shape: Sequence[int]) -> int:
    """Position of a piece's first element in a row-major tensor."""
    if not shape:
        return 0
    strides = itertools.accumulate(reversed([*shape[1:], 1]), lambda a, b: a * b)
    return sum(o * s for o, s in zip(piece.offset, reversed(list(strides)), strict=True))


def _part(tensor: Tensor, box: Box) -> Tensor:
    """:func:`boxes.view`, without the making of a view where the box is the whole tensor."""
    return tensor if box.shape == tensor.shape else boxes.view(tensor, box)


def _direct(piece: Box, dtype: torch.dtype, parts: Sequence[tuple[Want, Box]]) -> memoryview | None:
    """The memory of the one local tensor that takes the whole piece as it is; None if there is no such tensor."""
    if len(parts) != 1 or parts[0][1] != piece or not piece.numel:
        return None
    want = parts[0][0]
    target = _part(want.into, piece.within(want.box))
    if target.device.type != "cpu" or target.dtype != dtype or not target.is_contiguous():
        return None
    return tensor_file.host_bytes(target)
