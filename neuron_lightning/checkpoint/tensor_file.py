"""safetensors files: the layout of new ones, the bytes of tensors, and reading by slices.

The format is that of https://huggingface.co/docs/safetensors (eight bytes of header length, a JSON header, raw
row-major little-endian data), so any safetensors reader opens the files. They are written here and not by the
library because the library cannot hash what it writes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuron_lightning.checkpoint.storage import FileReader
from neuron_lightning.errors import CheckpointError

ALGORITHMS = ("sha256", "sha512", "blake2b")
_MAX_HEADER = 100_000_000
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, struct.error)
SLAB = 32 << 20
"""Bytes that are copied to host memory at a time."""

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES_BY_CODE = {code: dtype for dtype, code in DTYPES.items()}
DTYPE_NAMES: dict[str, torch.dtype] = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: ``data`` bytes from ``offset`` on, counted from the end of the header."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """Where everything stands in a file.

    Attributes:
        header: the file's first bytes; the tensors follow without gaps.
        entries: by offset; the widest dtypes come first, so that each is aligned.
        size: bytes of the tensors together.
    """

    header: bytes
    entries: tuple[Entry, ...]
    size: int

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> Layout:
        """The layout of a new file for (key, dtype, shape). Raises :class:`CheckpointError` for an unknown dtype."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        entries, end = [], 0
        for key, dtype, shape in sorted(tensors, key=lambda t: (-t[1].itemsize, t[0])):
            entry = Entry(key, checked_dtype(key, dtype), tuple(shape), end)
            end += entry.size
            header[key] = {
                "dtype": DTYPES[dtype],
                "shape": list(shape),
                "data_offsets": [entry.offset, end],
            }
            entries.append(entry)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return cls(struct.pack("<Q", len(text)) + text, tuple(entries), end)


def checked_dtype(key: str, dtype: torch.dtype) -> torch.dtype:
    """``dtype``. Raises :class:`CheckpointError` if safetensors has no name for it."""
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{key} has dtype {dtype}, which safetensors cannot hold: convert it to one of {', '.join(DTYPE_NAMES)}."
        )
    return dtype


def host_bytes(tensor: Tensor) -> memoryview:
    """The elements of ``tensor``, row-major, in host memory (no copy if they are there already)."""
    if not tensor.numel():
        return memoryview(b"")
    host = tensor.detach().to("cpu").contiguous()
    flat = host.as_strided(
        (host.numel(),), (1,)
    )  # a contiguous tensor may have odd strides where it has one element
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


def is_host_bytes(tensor: Tensor) -> bool:
    """Whether :func:`host_bytes` is the tensor's own memory, not a copy."""
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def host_pieces(tensor: Tensor) -> Iterator[memoryview]:
    """:func:`host_bytes` piece by piece: what must be copied is, in slabs of about :data:`SLAB` bytes."""
    rows, size = tensor.shape[0] if tensor.dim() else 1, tensor.numel() * tensor.element_size()
    if size <= SLAB or is_host_bytes(tensor):
        yield host_bytes(tensor)
        return
    step = max(1, SLAB * rows // size)
    for start in range(0, rows, step):
        yield host_bytes(tensor.narrow(0, start, min(step, rows - start)))


def read_layout(reader: FileReader) -> Layout:
    """The layout of an existing file.

    Raises:
        CheckpointError: the header is not one that describes this file byte for byte.
    """
    try:
        (length,) = struct.unpack("<Q", reader.read(0, 8))
        if length > min(_MAX_HEADER, reader.size - 8):
            raise ValueError(f"a header of {length} bytes")
        header = reader.read(0, 8 + length)
        entries = _entries(json.loads(header[8:].decode()))
        end = 0
        for entry in entries:
            if entry.offset != end:
                raise ValueError(f"{entry.key[:200]} does not start where the tensor before it ends")
            end += entry.size
        if len(header) + end != reader.size:
            raise ValueError(f"{end} bytes of tensors, but {reader.size - len(header)} follow the header")
    except (CheckpointError, *_DAMAGE) as error:
        raise CheckpointError(
            f"{reader.where} is not a safetensors file ({str(error)[:300]}): the checkpoint is damaged."
        ) from error
    return Layout(header, tuple(entries), end)


def _entries(header: dict[str, Any]) -> list[Entry]:
    found = []
    for key, record in header.items():
        if key == "__metadata__":
            continue
        shape, (start, stop) = tuple(record["shape"]), record["data_offsets"]
        if any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
            raise ValueError(f"{key[:200]}: a shape or offset is not a number of elements or bytes")
        entry = Entry(key, _DTYPES_BY_CODE[record["dtype"]], shape, start)
        if stop - start != entry.size:
            raise ValueError(f"{key[:200]}: {stop - start} bytes for a shape of {str(shape)[:200]}")
        found.append(entry)
    return sorted(found, key=lambda entry: (entry.offset, entry.size))
