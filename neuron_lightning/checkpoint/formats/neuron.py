"""Our own folders, read and written by one process without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_lightning.checkpoint import manifest, output, storage, typed_json
from neuron_lightning.checkpoint.boxes import Box, intersect, whole
from neuron_lightning.checkpoint.formats import pickled, staging, stream
from neuron_lightning.checkpoint.formats.contents import Contents, Counter, Entry, Progress, by_size, silent
from neuron_lightning.checkpoint.manifest import FileRecord, Manifest, StoredBox, TensorRecord
from neuron_lightning.checkpoint.plan import TRAINER_FILE
from neuron_lightning.checkpoint.reader import Checkpoint
from neuron_lightning.checkpoint.storage import Place
from neuron_lightning.errors import CheckpointError

MAX_FILE_BYTES = 5 * 10**9
_PREFIXES = ("model/", "average.", "optimizer.")
_OUTSIDE = ("layout", "optimizer_states")
"""Trainer state that says which layout wrote a checkpoint, and whether it holds optimizer state."""


def read(path: Path, *, verify: bool = True, progress: Progress = silent) -> Contents:
    """Describes a committed folder; random states of ranks are left out, since they belong to one layout.

    Args:
        path: the checkpoint.
        verify: whether every file's hash is checked first.
        progress: told how far that is.

    Raises:
        CheckpointError: no checkpoint, or damaged.
    """
    checkpoint = Checkpoint(path)
    checkpoint.check_listing()
    if verify:
        check_hashes(checkpoint, progress)
    document = checkpoint.read_trainer()
    tensors = {
        name: Entry(record.dtype, record.shape, _reader(checkpoint, record))
        for name, record in checkpoint.manifest.tensors.items()
        if name.startswith(_PREFIXES)
    }
    return Contents(
        tensors=tensors,
        aliases=dict(checkpoint.manifest.aliases),
        scalars={owner: dict(numbers) for owner, numbers in checkpoint.manifest.scalars.items()},
        groups=document["optimizers"],
        trainer=document["trainer"],
    )


def check_hashes(checkpoint: Checkpoint, progress: Progress = silent) -> None:
    """Checks every file of a checkpoint. Raises :class:`CheckpointError`, naming the first that is damaged."""
    files = checkpoint.manifest.files
    count = Counter(progress, "verify", sum(record.size for record in files.values()))
    for name in files:
        checkpoint.check_hash(name, count)


def _reader(checkpoint: Checkpoint, record: TensorRecord) -> Callable[[Box], Tensor]:
    def read_box(box: Box) -> Tensor:
        if box.numel and intersect(box, whole(record.shape)) != box:
            raise CheckpointError(
                f"the box at {box.offset} of shape {box.shape} is not inside {record.shape}."
            )
        tensor = torch.empty(box.shape, dtype=record.dtype, device="cpu")
        checkpoint.read_box(record, box, tensor)
        return tensor

    return read_box


def write(
    target: str | Path,
    contents: Contents,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    overwrite: bool = False,
    progress: Progress = silent,
) -> None:
    """Writes and commits a checkpoint that any layout loads. One process; memory for a few slices.

    Args:
        target: the folder to create, or a URL.
        contents: what it will hold.
        max_file_bytes: size at which another file is begun.
        overwrite: whether a checkpoint of that name may be replaced.
        progress: told how far it is.

    Raises:
        CheckpointError: something is in the way, or ``contents`` hold what cannot be stored.
    """
    place = storage.place(target)
    if isinstance(place, storage.LocalPlace):
        staging.check_free(place.path, overwrite)
    attempt = place.prepare()
    complete = False
    try:
        written = _Files(place, attempt, max_file_bytes).write(contents, progress)
        progress("commit", 0, 0)
        place.sync(attempt)
        place.publish(manifest.serialise(written), attempt)
        complete = True
    finally:
        if not complete:
            place.discard(attempt)


class _Files:
    """The files of one attempt."""

    def __init__(self, place: Place, attempt: str, limit: int) -> None:
        self._place, self._attempt, self._limit = place, attempt, limit
        self.files: dict[str, FileRecord] = {}
        self.tensors: dict[str, TensorRecord] = {}

    def write(self, contents: Contents, progress: Progress) -> Manifest:
        """Writes everything but the manifest, which it returns."""
        count = Counter(progress, "write", sum(entry.nbytes for entry in contents.tensors.values()))
        state = {name: entry for name, entry in contents.tensors.items() if not name.startswith("model/")}
        model = {name: entry for name, entry in contents.tensors.items() if name not in state}
        for kind, entries in (("model", model), ("optimizer", state)):
            for number, members in enumerate(by_size(list(entries.items()), self._limit), 1):
                if members:
                    self._write_tensors(f"part-{number:05d}.{kind}.safetensors", kind, members, count)
        trainer = {key: value for key, value in contents.trainer.items() if key not in _OUTSIDE}
        if contents.groups:
            trainer["optimizer_states"] = []  # as the strategy marks what can be resumed
        self._write_trainer({"trainer": trainer, "optimizers": contents.groups})
        return Manifest(
            step=_number(trainer.get("global_step")),
            epoch=_number(trainer.get("epoch")),
            versions=manifest.versions(),
            data=trainer.get("data_position"),
            files=self.files,
            tensors=self.tensors,
            aliases=contents.aliases,
            scalars={owner: numbers for owner, numbers in contents.scalars.items() if numbers},
        )

    def _write_tensors(
        self,
        base: str,
        kind: str,
        members: list[tuple[str, Entry]],
        count: Callable[[int], None] | None = None,
    ) -> None:
        name, sink = self._create(base)
        self.files[name] = FileRecord(kind, *_swapped(stream.write_entries(sink, members, on_bytes=count)))
        for key, entry in members:
            stored = () if 0 in entry.shape else (StoredBox(name, key, whole(entry.shape)),)
            self.tensors[key] = TensorRecord(entry.dtype, entry.shape, stored)

    def _write_trainer(self, document: dict[str, Any]) -> None:
        data, tensors = typed_json.encode(document, where="trainer state", tensor_prefix="trainer")
        text = json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
        name, sink = self._create(TRAINER_FILE)
        self.files[name] = FileRecord("trainer", *_swapped(output.write_bytes(sink, [text])))
        if tensors:
            beside = TRAINER_FILE.removesuffix(".json") + ".safetensors"
            self._write_tensors(beside, "trainer", [(k, pickled.entry_of(t)) for k, t in tensors.items()])

    def _create(self, base: str) -> tuple[str, output.Sink]:
        name = self._place.file_name(base, self._attempt)
        return name, self._place.create(name, self._attempt)


def _swapped(finished: tuple[int, str]) -> tuple[int, str, str]:
    return finished[0], output.ALGORITHM, finished[1]


def _number(value: Any) -> int | None:
    return value if type(value) is int else None
