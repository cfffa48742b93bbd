"""Reads committed folders: checks them, and copies any box of any tensor from whatever boxes are stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_lightning.checkpoint import boxes, commit, manifest, tensor_file, typed_json
from neuron_lightning.checkpoint.boxes import Box
from neuron_lightning.checkpoint.exchange import Ranks
from neuron_lightning.checkpoint.manifest import TensorRecord
from neuron_lightning.checkpoint.tensor_file import TensorReader
from neuron_lightning.errors import CheckpointError

Progress = Callable[[str, int, int], None]


class Checkpoint:
    """A committed folder with a manifest that matches its own digest.

    Args:
        path: the checkpoint's name.

    Raises:
        CheckpointError: there is none, or its manifest is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.folder = commit.locate(path)
        self.manifest = manifest.read(self.folder)
        self._open: dict[str, TensorReader] = {}

    def files(self, kinds: Collection[str]) -> list[str]:
        """Names of the files of some kinds."""
        return [name for name, record in self.manifest.files.items() if record.kind in kinds]

    def check_listing(self) -> None:
        """Checks that the folder holds the files that the manifest lists, with their sizes, and no others."""
        for name, record in self.manifest.files.items():
            if (size := commit.require_regular(self.folder / name)) != record.size:
                raise CheckpointError(
                    f"{self.folder / name} has {size} bytes, the manifest says {record.size}: the checkpoint is damaged; "
                    "use another one."
                )
        known = {commit.MANIFEST, *self.manifest.files}
        if extra := sorted(entry.name for entry in self.folder.iterdir() if entry.name not in known):
            raise CheckpointError(
                f"{self.folder} holds {extra[0]!r}, which its manifest does not list: move it away, or use another "
                "checkpoint."
            )

    def check_hash(self, name: str, on_bytes: Callable[[int], None] | None = None) -> None:
        """Checks one file against its hash. Raises :class:`CheckpointError`, naming it."""
        record, path = self.manifest.files[name], self.folder / name
        commit.require_regular(path)
        if tensor_file.hash_file(path, record.algorithm, on_bytes) != record.hash:
            raise _damaged(path)

    def read_box(self, record: TensorRecord, box: Box, into: Tensor) -> int:
        """Copies the elements of ``box`` into a tensor of the same shape, converting its dtype. Returns bytes read.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        plan, _ = boxes.cover(box, (stored.box for stored in record.boxes))
        size = 0
        for index, common in plan:
            stored = record.boxes[index]
            expected = (record.dtype, stored.box.shape)
            data = self._reader(stored.file).read(stored.key, expected, common.within(stored.box))
            boxes.view(into, common.within(box)).copy_(data)
            size += data.numel() * data.element_size()
        return size

    def read_tensor(self, name: str) -> Tensor:
        """A whole global tensor, on the CPU. Raises :class:`CheckpointError` if there is none of that name."""
        record = self.manifest.resolve(name)
        if record is None:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}.")
        tensor = torch.empty(record.shape, dtype=record.dtype)
        self.read_box(record, boxes.whole(record.shape), tensor)
        return tensor

    def read_document(self, name: str) -> Any:
        """The value stored as typed JSON in a file; the tensors that it refers to are verified too."""
        record, path = self.manifest.files[name], self.folder / name
        commit.require_regular(path)
        raw = path.read_bytes()
        if len(raw) != record.size or hashlib.new(record.algorithm, raw).hexdigest() != record.hash:
            raise _damaged(path)
        beside = name.removesuffix(".json") + ".safetensors"
        if beside in self.manifest.files:
            self.check_hash(beside)
        try:
            return typed_json.decode(json.loads(raw), self.read_tensor)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not the JSON that this package writes: {error}") from error

    def _reader(self, name: str) -> TensorReader:
        if name not in self._open:
            self._open[name] = TensorReader(self.folder / name)
        return self._open[name]


def verify(checkpoint: Checkpoint, kinds: Iterable[str], ranks: Ranks, progress: Progress) -> None:
    """Checks the folder's listing and the hashes of the files of some kinds, each file by one rank. Collective.

    Raises:
        CheckpointError: on all ranks, naming the first damaged file.
    """
    names = sorted(checkpoint.files(tuple(kinds)), key=lambda n: (-checkpoint.manifest.files[n].size, n))
    mine = names[ranks.rank :: ranks.size]
    total = sum(checkpoint.manifest.files[name].size for name in mine)
    done = 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        progress("verify", done, total)

    def work() -> None:
        if ranks.rank == 0:
            checkpoint.check_listing()
        for name in mine:
            checkpoint.check_hash(name, count)

    ranks.together(f"verify the checkpoint {checkpoint.folder}", work)


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} does not match its hash in the manifest: the file is damaged; use another checkpoint."
    )
