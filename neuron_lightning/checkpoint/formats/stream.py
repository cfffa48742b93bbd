"""safetensors files that are written and read a slice at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from neuron_lightning.checkpoint import commit, tensor_file
from neuron_lightning.checkpoint.boxes import Box
from neuron_lightning.checkpoint.formats.contents import Entry, slices
from neuron_lightning.checkpoint.output import HashedFile, Sink
from neuron_lightning.errors import CheckpointError

_DTYPES = {name: dtype for dtype, name in tensor_file.DTYPES.items()}


def write_entries(
    sink: Sink,
    entries: Sequence[tuple[str, Entry]],
    *,
    metadata: Mapping[str, str] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[int, str]:
    """Writes a new safetensors file durably, a few slices in memory at a time.

    Returns:
        Size of the file, and its hash.
    """
    ordered = sorted(entries, key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for key, entry in ordered:
        start, end = end, end + entry.nbytes
        header[key] = {
            "dtype": tensor_file.DTYPES[tensor_file.checked_dtype(key, entry.dtype)],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with HashedFile(sink, on_bytes) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, entry in ordered:
            for box in slices(entry.shape, entry.dtype.itemsize):
                file.write(tensor_file.host_bytes(_checked(key, entry, box, entry.read(box))))
        return file.finish()


def _checked(key: str, entry: Entry, box: Box, tensor: Tensor) -> Tensor:
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != box.shape:
        raise CheckpointError(
            f"{key}: its source gave {tensor.dtype} {tuple(tensor.shape)} for a box of {entry.dtype} {box.shape}."
        )
    return tensor


def read_entries(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata.

    Raises:
        CheckpointError: no such file, or damaged.
    """
    commit.require_regular(path)
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
        names = list(file.keys())
        described = {name: file.get_slice(name) for name in names}
        entries = {
            name: Entry(_DTYPES[part.get_dtype()], tuple(part.get_shape()), _reader(path, file, name))
            for name, part in described.items()
        }
        return entries, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}): it is damaged.") from error
    except KeyError as error:
        raise CheckpointError(
            f"{path} holds a tensor of dtype {error}, which this release cannot read."
        ) from error


def _reader(path: Path, file: Any, name: str) -> Callable[[Box], Tensor]:
    def read(box: Box) -> Tensor:
        try:
            if not box.shape:
                tensor: Tensor = file.get_tensor(name)
            else:
                index = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
                tensor = file.get_slice(name)[index]
        except SafetensorError as error:
            raise CheckpointError(f"{path}: cannot read {name} ({error}): the file is damaged.") from error
        return tensor

    return read
