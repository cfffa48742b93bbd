"""safetensors files: the layout of new ones, the bytes of tensors, and reading by slices.

The format is that of https://huggingface.co/docs/safetensors (eight bytes of header length, a JSON header, raw
row-major little-endian data), so any safetensors reader opens the files. They are written here and not by the
library because the library cannot hash what it writes.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from neuron_lightning.checkpoint import commit
from neuron_lightning.checkpoint.boxes import Box
from neuron_lightning.errors import CheckpointError

ALGORITHMS = ("sha256", "sha512", "blake2b")
_CHUNK = 8 << 20
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
    data: memoryview = host.reshape(-1).view(torch.uint8).numpy().data
    return data


def host_pieces(tensor: Tensor) -> Iterator[memoryview]:
    """:func:`host_bytes` piece by piece: what must be copied is, in slabs of about :data:`SLAB` bytes."""
    rows, size = tensor.shape[0] if tensor.dim() else 1, tensor.numel() * tensor.element_size()
    if size <= SLAB or (tensor.device.type == "cpu" and tensor.is_contiguous()):
        yield host_bytes(tensor)
        return
    step = max(1, SLAB * rows // size)
    for start in range(0, rows, step):
        yield host_bytes(tensor.narrow(0, start, min(step, rows - start)))


def hash_file(path: Path, algorithm: str, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hash of a file's contents, in hexadecimal."""
    digest = hashlib.new(algorithm)
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if on_bytes is not None:
                on_bytes(count)
    return digest.hexdigest()


class TensorReader:
    """Slices of the tensors in one safetensors file.

    Args:
        path: a regular file.
    """

    def __init__(self, path: Path) -> None:
        commit.require_regular(path)
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a safetensors file ({error}): the checkpoint is damaged."
            ) from error

    def read(self, key: str, expected: tuple[torch.dtype, tuple[int, ...]], box: Box | None = None) -> Tensor:
        """The elements of ``box`` (default: all) of the tensor ``key``, on the CPU.

        Raises:
            CheckpointError: no such key, or not of the expected dtype and shape.
        """
        dtype, shape = expected
        try:
            stored = self._file.get_slice(key)
            found = (stored.get_dtype(), tuple(stored.get_shape()))
            if found != (DTYPES[dtype], shape):
                raise CheckpointError(
                    f"{self.path}: {key} is {found[0]} {found[1]}, but the manifest says {DTYPES[dtype]} {shape}."
                )
            if box is None or not shape:
                tensor: Tensor = self._file.get_tensor(key)
            else:
                tensor = stored[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))]
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.path}: cannot read {key} ({error}): the file is damaged."
            ) from error
        return tensor
