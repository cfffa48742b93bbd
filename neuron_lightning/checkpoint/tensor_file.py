"""safetensors files: written in one pass that hashes as it writes, read by slices.

The format is that of https://huggingface.co/docs/safetensors (eight bytes of header length, a JSON header, raw
row-major little-endian data), so any safetensors reader opens the files. They are written here and not by the
library because the library cannot hash what it writes.

The hash is SHA-256: with the processor's SHA instructions it is the fastest secure hash of :mod:`hashlib` (1.7 GiB/s
on one core where BLAKE2b, the fastest without them, reaches 0.9), and it runs beside the write in a second thread.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from neuron_lightning.checkpoint import points
from neuron_lightning.checkpoint.boxes import Box
from neuron_lightning.errors import CheckpointError

ALGORITHM = "sha256"
ALGORITHMS = ("sha256", "sha512", "blake2b")
_CHUNK = 8 << 20
_SMALL = 1 << 20

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


class HashedFile:
    """A new file that is hashed in a second thread while it is written, and durable once it is closed.

    Args:
        path: must not exist.
        on_bytes: called with the number of bytes after each piece.
    """

    def __init__(self, path: Path, on_bytes: Callable[[int], None] | None = None) -> None:
        self._hash = hashlib.new(ALGORITHM)
        self._on_bytes = on_bytes
        self._file: BinaryIO = path.open("xb")
        self._thread = ThreadPoolExecutor(max_workers=1)
        self.size = 0

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        self._file.close()

    def write(self, data: bytes | memoryview) -> None:
        """Appends ``data``."""
        for start in range(0, len(data), _CHUNK):
            chunk = data[start : start + _CHUNK]
            if len(chunk) < _SMALL:
                self._hash.update(chunk)
                self._file.write(chunk)
            else:
                hashing = self._thread.submit(self._hash.update, chunk)
                try:
                    self._file.write(chunk)
                finally:
                    hashing.result()
            self.size += len(chunk)
            if self._on_bytes is not None:
                self._on_bytes(len(chunk))

    def finish(self) -> str:
        """Makes the data durable; the hash in hexadecimal."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._hash.hexdigest()


def write_bytes(path: Path, data: bytes) -> tuple[int, str]:
    """Writes a new file durably. Returns its size and hash."""
    with HashedFile(path) as file:
        file.write(data)
        return len(data), file.finish()


def write_tensors(
    path: Path, tensors: Sequence[tuple[str, Tensor]], on_bytes: Callable[[int], None] | None = None
) -> tuple[int, str]:
    """Writes a new safetensors file durably, one tensor in host memory at a time.

    Args:
        path: must not exist.
        tensors: (key, tensor on any device); not necessarily contiguous.
        on_bytes: called with the number of bytes after each piece.

    Returns:
        Size of the file, and its hash.
    """
    ordered = sorted(tensors, key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPES[checked_dtype(key, tensor)],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with HashedFile(path, on_bytes) as file:
        points.reach("share_opened")
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            file.write(host_bytes(tensor))
        return file.size, file.finish()


def checked_dtype(key: str, tensor: Tensor) -> torch.dtype:
    """The dtype of ``tensor``. Raises :class:`CheckpointError` if safetensors has no name for it."""
    if tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"{key} has dtype {tensor.dtype}, which safetensors cannot hold: convert it to one of {', '.join(DTYPE_NAMES)}."
        )
    return tensor.dtype


def host_bytes(tensor: Tensor) -> memoryview:
    """The elements of ``tensor``, row-major, in host memory (no copy if they are there already)."""
    if not tensor.numel():
        return memoryview(b"")
    host = tensor.detach().to("cpu").contiguous()
    return host.reshape(-1).view(torch.uint8).numpy().data


def require_regular(path: Path) -> int:
    """The size of a file that must be a regular one.

    Raises:
        CheckpointError: missing, a link, or something else than a file.
    """
    try:
        status = os.lstat(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}): the checkpoint is incomplete."
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file: links and devices in a checkpoint are refused.")
    return status.st_size


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
        require_regular(path)
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
