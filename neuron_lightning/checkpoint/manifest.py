"""``manifest.json``: what a checkpoint folder holds, and how to know that it still holds it.

One JSON object in canonical form (keys sorted, no spaces, ASCII), whose last member is the digest of all that
stands before it; a file that differs from the canonical form by one byte is refused. Members:

``format``: ``"neuron_lightning.checkpoint"``. ``version``: 1. ``step``, ``epoch``: int or null.
``state_dict_type``: ``"deduped"`` or ``"sharded"``. ``mesh``: ranks by axis of the layout that wrote it.
``versions``: of this package, torch, lightning and Python. ``data``: position in the data, typed JSON, or null.
``files``: by name ``{kind, size, algorithm, hash}`` with kind ``model, optimizer, trainer`` or ``rank``.
``tensors``: by name ``{dtype, shape, boxes}``, boxes being ``{file, key, offset, shape}``. Names start with
``model/`` or ``optimizer.<index>/`` (then ``<parameter>/<state key>``), ``trainer/`` or ``rank.<rank>/``.
``aliases``: name of a tied tensor to the name under which it is stored.
``scalars``: by ``optimizer.<index>/<parameter>`` the numbers of its state, such as ``step`` (typed JSON).
``digest``: ``{algorithm, hash}``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from neuron_lightning.checkpoint import output, tensor_file, typed_json
from neuron_lightning.checkpoint.boxes import Box, cover, intersect, whole
from neuron_lightning.checkpoint.collector import uncollected
from neuron_lightning.checkpoint.commit import MANIFEST
from neuron_lightning.checkpoint.storage import Folder, LocalFolder
from neuron_lightning.errors import CheckpointError

FORMAT = "neuron_lightning.checkpoint"
VERSION = 1
KINDS = ("model", "optimizer", "trainer", "rank")
_FILE_NAME = re.compile(r"[\w.-]+", re.ASCII)
_MAX_BYTES = 1 << 30
_MAX_NUMEL = 1 << 50
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)


@dataclass(frozen=True)
class FileRecord:
    """One file: what it is for, its size in bytes, and its hash."""

    kind: str
    size: int
    algorithm: str
    hash: str


@dataclass(frozen=True)
class StoredBox:
    """A box of a global tensor and where it is stored."""

    file: str
    key: str
    box: Box


@dataclass(frozen=True)
class TensorRecord:
    """One global tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[StoredBox, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The parsed contents; the module's docstring says what they mean."""

    step: int | None = None
    epoch: int | None = None
    state_dict_type: str = "deduped"
    mesh: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    data: Any = None
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    tensors: Mapping[str, TensorRecord] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    scalars: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def resolve(self, name: str) -> TensorRecord | None:
        """The tensor of that name, or the one that it is tied to; None if there is neither."""
        return self.tensors.get(self.aliases.get(name, name))

    def check_cover(self, *, allow_overlap: bool) -> None:
        """Checks that the boxes of every tensor hold each of its elements (once, unless overlaps are allowed).

        Raises:
            CheckpointError: naming the tensor and the box.
        """
        for name, tensor in self.tensors.items():
            if _are_slabs([stored.box for stored in tensor.boxes], tensor.shape):
                continue
            _, missing = cover(whole(tensor.shape), (stored.box for stored in tensor.boxes))
            if missing:
                raise CheckpointError(
                    f"{name}: no rank holds the elements from {missing[0].offset} on, shape {missing[0].shape}, of the "
                    f"global shape {tensor.shape}: the shard specs of the ranks do not fit together."
                )
            stored = sum(stored.box.numel for stored in tensor.boxes)
            if not allow_overlap and stored != math.prod(tensor.shape):
                raise CheckpointError(
                    f"{name}: {stored} elements are stored for the {math.prod(tensor.shape)} of shape {tensor.shape}: "
                    "ranks hold overlapping boxes that are not equal."
                )


def _are_slabs(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Whether the boxes are slices of a tensor along one dimension, in order and without a gap: the usual case."""
    if len(boxes) == 1:
        return boxes[0] == whole(shape)
    cut = [d for d, extent in enumerate(shape) if any(box.shape[d] != extent for box in boxes)]
    if len(cut) != 1:
        return False
    end = 0
    for start, extent in sorted((box.offset[cut[0]], box.shape[cut[0]]) for box in boxes):
        if start != end:
            return False
        end += extent
    return end == shape[cut[0]] and all(
        offset == 0 for box in boxes for d, offset in enumerate(box.offset) if d != cut[0]
    )


@functools.cache
def versions() -> Mapping[str, str]:
    """Versions of what writes the checkpoint."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("neuron_lightning", "lightning"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def serialise(manifest: Manifest) -> bytes:
    """The bytes of ``manifest.json``."""
    body = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "epoch": manifest.epoch,
        "state_dict_type": manifest.state_dict_type,
        "mesh": dict(manifest.mesh),
        "versions": dict(manifest.versions),
        "data": typed_json.encode(manifest.data, where="data_position")[0],
        "files": {name: vars(record) for name, record in manifest.files.items()},
        "tensors": {name: _tensor_json(record) for name, record in manifest.tensors.items()},
        "aliases": dict(manifest.aliases),
        "scalars": typed_json.encode({k: dict(v) for k, v in manifest.scalars.items()})[0],
    }
    return _seal(body)


@functools.lru_cache(maxsize=1)
@uncollected
def parse(raw: bytes, where: str) -> Manifest:
    """Reads and checks the bytes of a manifest; ``where`` names it in messages.

    A resume opens one checkpoint several times: the same bytes are not checked again.

    Raises:
        CheckpointError: not in canonical form, a wrong digest, an unknown version, or contents that cannot be right.
    """
    try:
        return _parse_body(_unseal(raw, where), where)
    except _DAMAGE as error:
        raise _damaged(where, error) from error


def _unseal(raw: bytes, where: str) -> dict[str, Any]:
    """The body of a manifest that matches its own digest."""
    document = json.loads(raw.decode())
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{where} is not a manifest of this package (format {FORMAT!r}).")
    if document.get("version") != VERSION:
        raise CheckpointError(
            f"{where} has format version {document.get('version')!r}; this release reads version {VERSION}: "
            "use a release that matches the checkpoint."
        )
    body = {key: value for key, value in document.items() if key != "digest"}
    if _seal(body) != raw:
        raise CheckpointError(
            f"{where} does not match its own digest: it is damaged or was edited; use another checkpoint."
        )
    return body


def _damaged(where: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{where} is damaged ({type(error).__name__}: {str(error)[:200]}); use another checkpoint."
    )


def read(folder: Folder | Path) -> Manifest:
    """The manifest of a committed folder. Raises :class:`CheckpointError`."""
    raw, where = _read_bytes(folder)
    return parse(raw, where)


def read_position(folder: Folder | Path) -> tuple[int | None, int | None]:
    """(step, epoch) of a committed folder whose manifest matches its digest. Raises :class:`CheckpointError`."""
    raw, where = _read_bytes(folder)
    try:
        body = _unseal(raw, where)
        return _optional_int(body["step"]), _optional_int(body["epoch"])
    except _DAMAGE as error:
        raise _damaged(where, error) from error


def _read_bytes(folder: Folder | Path) -> tuple[bytes, str]:
    opened = LocalFolder(folder) if isinstance(folder, Path) else folder
    with opened.open(MANIFEST) as reader:
        if reader.size > _MAX_BYTES:
            raise CheckpointError(
                f"{reader.where} has {reader.size} bytes; no manifest has over {_MAX_BYTES}."
            )
        return reader.read(0, reader.size), reader.where


def _seal(body: Mapping[str, Any]) -> bytes:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = hashlib.new(output.ALGORITHM, text.encode()).hexdigest()
    tail = json.dumps({"algorithm": output.ALGORITHM, "hash": digest}, separators=(",", ":"))
    return f'{text[:-1]},"digest":{tail}}}\n'.encode()


def _tensor_json(record: TensorRecord) -> dict[str, Any]:
    boxes = [
        {"file": b.file, "key": b.key, "offset": list(b.box.offset), "shape": list(b.box.shape)}
        for b in record.boxes
    ]
    return {"dtype": str(record.dtype).removeprefix("torch."), "shape": list(record.shape), "boxes": boxes}


def _parse_body(body: Mapping[str, Any], where: str) -> Manifest:
    files = {check_file_name(name, where): _parse_file(record) for name, record in body["files"].items()}
    tensors = {name: _parse_tensor(name, record, files) for name, record in body["tensors"].items()}
    aliases = {str(name): str(target) for name, target in body["aliases"].items()}
    if dangling := [name for name, target in aliases.items() if target not in tensors]:
        raise ValueError(f"{dangling[0]} is tied to a tensor that is not there")
    manifest = Manifest(
        step=_optional_int(body["step"]),
        epoch=_optional_int(body["epoch"]),
        state_dict_type=str(body["state_dict_type"]),
        mesh={str(axis): int(size) for axis, size in body["mesh"].items()},
        versions={str(name): str(version) for name, version in body["versions"].items()},
        data=typed_json.decode(body["data"]),
        files=files,
        tensors=tensors,
        aliases=aliases,
        scalars=_parse_scalars(typed_json.decode(body["scalars"])),
    )
    _check_sizes(manifest)
    manifest.check_cover(allow_overlap=manifest.state_dict_type == "sharded")
    return manifest


def _check_sizes(manifest: Manifest) -> None:
    """No file is said to hold more than its bytes, so that no tensor is larger than what is on disk."""
    held: dict[str, int] = dict.fromkeys(manifest.files, 0)
    for tensor in manifest.tensors.values():
        for stored in tensor.boxes:
            held[stored.file] += stored.box.numel * tensor.dtype.itemsize
    for name, size in held.items():
        if size > manifest.files[name].size:
            raise ValueError(f"{name} has {manifest.files[name].size} bytes and is said to hold {size}")


def check_file_name(name: str, where: str) -> str:
    """``name`` if it can only be a file in the checkpoint's own folder. Raises :class:`CheckpointError`."""
    if not _FILE_NAME.fullmatch(name) or name in (".", "..", MANIFEST):
        raise CheckpointError(
            f"{where} names the file {name[:200]!r}: names are letters, digits, '_', '.' and '-' only; such a "
            "checkpoint is refused."
        )
    return name


def _parse_file(record: Mapping[str, Any]) -> FileRecord:
    found = FileRecord(record["kind"], record["size"], record["algorithm"], record["hash"])
    if found.kind not in KINDS or found.algorithm not in tensor_file.ALGORITHMS:
        raise ValueError(f"unknown kind {found.kind!r} or hash {found.algorithm!r}")
    if type(found.size) is not int or found.size < 0 or not isinstance(found.hash, str):
        raise ValueError(f"size {found.size!r} or hash {found.hash!r} cannot be")
    return found


def _parse_tensor(name: str, record: Mapping[str, Any], files: Mapping[str, FileRecord]) -> TensorRecord:
    shape = _shape(name, record["shape"])
    boxes = []
    for entry in record["boxes"]:
        box = Box(_shape(name, entry["offset"]), _shape(name, entry["shape"]))
        if (
            len(box.shape) != len(shape)
            or len(box.offset) != len(shape)
            or intersect(box, whole(shape)) != box
        ):
            raise ValueError(f"{name}: the box at {box.offset} of shape {box.shape} is not inside {shape}")
        if entry["file"] not in files:
            raise ValueError(f"{name}: the file {entry['file']!r} is not listed")
        boxes.append(StoredBox(entry["file"], str(entry["key"]), box))
    return TensorRecord(tensor_file.DTYPE_NAMES[record["dtype"]], shape, tuple(boxes))


def _parse_scalars(scalars: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        owner: {key: float(number) for key, number in values.items()} for owner, values in scalars.items()
    }


def _shape(name: str, numbers: Any) -> tuple[int, ...]:
    shape = tuple(numbers)
    plausible = all(type(n) is int and 0 <= n <= _MAX_NUMEL for n in shape) and len(shape) <= 16
    if not plausible or math.prod(shape) > _MAX_NUMEL:
        raise ValueError(f"{name[:200]}: a shape or offset of {str(shape)[:200]} cannot be")
    return shape


def _optional_int(value: Any) -> int | None:
    if value is not None and type(value) is not int:
        raise ValueError(f"{value!r} is not an integer")
    return value
