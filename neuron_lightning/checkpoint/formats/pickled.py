"""Files that torch pickled: read without running code, and written without holding their tensors in memory.

Reading goes through torch's weights-only unpickler: tensors, containers and numbers, and of NxD's files the one class
that stands for a tensor in another file. Any other class or function is refused before it is called. Tensors are
mapped from the file where its format allows that (every file since torch 1.6).
"""

from __future__ import annotations

import os
import pickle
import struct
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_lightning.checkpoint import commit
from neuron_lightning.checkpoint.boxes import view
from neuron_lightning.checkpoint.formats.contents import Entry, slices
from neuron_lightning.errors import CheckpointError

_REFERENCE = "torch_xla.utils.serialization.TensorReference"
_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    struct.error,
)


class TensorReference:
    """A tensor in a file of its own: what ``torch_xla.utils.serialization`` leaves in its place.

    Attributes:
        tid: number of the tensor's file.
    """

    def __init__(self, tid: int) -> None:
        self.tid = tid


def load(path: Path, *, trusted: bool = False) -> Any:
    """What is in a file that torch wrote; tensors are mapped, not read.

    Args:
        path: the file.
        trusted: unpickle whatever it holds, which runs its code. For files whose origin the user vouches for.

    Raises:
        CheckpointError: missing, damaged, or it holds anything but tensors, containers and numbers.
    """
    commit.require_regular(path)
    allowed: list[Any] = [(TensorReference, _REFERENCE)]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=not trusted, mmap=_is_zip(path))
    except _ERRORS as error:
        raise CheckpointError(
            f"{path} is refused ({reason(error)}): it holds code or classes, or it is damaged. Such files are never "
            "unpickled here; rewrite it where it was made, with plain containers, numbers and tensors."
        ) from error


def reason(error: BaseException) -> str:
    """What torch says is wrong with a file, without its advice to run the code in it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    at = next((number for number, line in enumerate(lines) if "rror:" in line), None)
    if at is None:
        return (lines[0] if lines else type(error).__name__)[:300]
    after = lines[at].rpartition("rror:")[2].strip()
    return (after or " ".join(lines[at + 1 : at + 2]) or type(error).__name__)[:300]


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def entry_of(tensor: Tensor) -> Entry:
    """A tensor in memory (or mapped) as an entry."""
    return Entry(tensor.dtype, tuple(tensor.shape), lambda box: view(tensor, box))


class Scratch:
    """Tensors on disk instead of in memory, for as long as a file is being put together from them.

    Args:
        folder: where: beside the file that is being written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def empty(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A tensor of zeros that is mapped from a file which has no name and goes when the tensor does."""
        numel = torch.Size(shape).numel()
        if not numel:
            return torch.zeros(shape, dtype=dtype, device="cpu")
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".scratch-") as file:
            file.truncate(numel * dtype.itemsize)
            storage = torch.UntypedStorage.from_file(file.name, shared=True, nbytes=numel * dtype.itemsize)
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape)  # type: ignore[call-overload,no-any-return]

    def copy(self, entry: Entry) -> Tensor:
        """A whole entry, filled slice by slice."""
        tensor = self.empty(entry.dtype, entry.shape)
        for box in slices(entry.shape, entry.dtype.itemsize):
            view(tensor, box).copy_(entry.read(box))
        return tensor


class _ReferencePickler(pickle._Pickler):
    """Writes :class:`TensorReference` under the name that torch_xla gives it, which need not be installed."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj is TensorReference:
            module, _, leaf = _REFERENCE.rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{leaf}\n".encode())  # type: ignore[attr-defined]
            self.memoize(obj)  # type: ignore[attr-defined]
        else:
            super().save_global(obj, name)  # type: ignore[misc]


_PICKLE = types.SimpleNamespace(Pickler=_ReferencePickler, __name__="pickle")


def save(value: Any, path: Path) -> None:
    """Writes a file that ``torch.load`` reads, durably. ``path`` must not exist."""
    path.touch(exist_ok=False)
    torch.save(
        value, path, pickle_module=_PICKLE
    )  # by name: given a file, torch copies each tensor to write it
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def scratch(folder: Path) -> Iterator[Scratch]:
    """A :class:`Scratch` in a temporary folder inside ``folder``."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".scratch-") as name:
        yield Scratch(Path(name))
