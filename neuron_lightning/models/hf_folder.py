"""A model in a folder as Hugging Face lays it out: safetensors files, their index, ``config.json``.

Names come from a map that is handed in, so that this file knows no architecture. Writing gathers one global
tensor at a time; neither side needs ``transformers``. Reading is in ``hf_reader.py``.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuron_lightning.checkpoint.boxes import Box, Placement, placements, view
from neuron_lightning.checkpoint.exchange import FAILURES, together
from neuron_lightning.checkpoint.tensor_file import DTYPES, host_bytes
from neuron_lightning.errors import CheckpointError
from neuron_lightning.parallel import collectives, mesh
from neuron_lightning.parallel.spec import get_spec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NameMap = Callable[[str], str]


@dataclass(frozen=True)
class Entry:
    """One global tensor and what this rank holds of it.

    Attributes:
        key: its name in the folder.
        param: the local parameter.
        placement: which box of the global tensor stands where in the local parameter.
        rows: rows of the local parameter that belong to it, padding included: equally many on every rank.
        replicated: whether every tensor-parallel rank holds all of it.
    """

    key: str
    param: nn.Parameter
    placement: Placement
    rows: slice
    replicated: bool


def entries_of(model: nn.Module, name_map: NameMap) -> list[Entry]:
    """The global tensors of ``model`` in the order of its parameters, tied ones once."""
    tp, found = mesh.current().sizes["tp"], []
    for name, param in model.named_parameters():
        start = 0
        parts = get_spec(param, tp).parts
        for part, placement in zip(parts, placements(name, param, tp), strict=True):
            rows = slice(start, start + part.local_rows)
            found.append(Entry(name_map(placement.name), param, placement, rows, part.replicas == tp))
            start += part.local_rows
    return found


def write_folder(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name_map: NameMap,
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes the whole model into ``folder``. Every rank calls it together; rank 0 writes.

    The folder appears under its name when it is complete. Besides its own shard, a rank of the first
    tensor-parallel group needs memory for one global tensor at a time.

    Args:
        model: its parameters carry their shard specs.
        folder: must not exist, or be empty, unless ``overwrite``.
        name_map: canonical global name to the name in the folder.
        config: contents of ``config.json``.
        dtype: of the written tensors; None: as they are.
        max_shard_bytes: size at which another file is begun.
        overwrite: replaces an existing folder.

    Raises:
        CheckpointError: on every rank, if rank 0 cannot write.
    """
    here, target = mesh.current(), Path(folder)
    entries = entries_of(model, name_map)
    files = _cut_into_files(entries, dtype, max_shard_bytes)
    together(f"begin the folder {target}", lambda: _begin(target, overwrite) if here.rank == 0 else None)
    failure = _write_files(target, files, dtype) if here.coordinates["dp"] == 0 else None

    def finish() -> None:
        if failure is not None:
            raise CheckpointError(failure)
        if here.rank == 0:
            _finish(target, files, config, dtype or next(model.parameters()).dtype)

    together(f"write the folder {target}", finish)


def _cut_into_files(
    entries: Sequence[Entry], dtype: torch.dtype | None, limit: int
) -> dict[str, list[Entry]]:
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        nbytes = _nbytes(entry, dtype)
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _nbytes(entry: Entry, dtype: torch.dtype | None) -> int:
    return math.prod(entry.placement.global_shape) * (dtype or entry.param.dtype).itemsize


def _partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def _begin(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target} exists: choose another folder, remove it, or pass overwrite=True.")
    shutil.rmtree(_partial(target), ignore_errors=True)
    _partial(target).mkdir(parents=True)


def _write_files(target: Path, files: Mapping[str, list[Entry]], dtype: torch.dtype | None) -> str | None:
    """Gathers every tensor over the first tensor-parallel group; its first rank writes. Returns its failure."""
    failure: str | None = None
    boxes = _boxes_of_group([entry for members in files.values() for entry in members])
    position = 0
    for name, members in files.items():
        header = _header(members, dtype)
        writer = _Writer(_partial(target) / name, header) if mesh.current().rank == 0 else None
        for entry in members:
            full = _gather(entry, [mine[position] for mine in boxes])
            position += 1
            if writer is not None:
                writer.add(full.to(dtype or full.dtype))
        if writer is not None:
            outcome = writer.close()
            failure = failure or outcome
    return failure


class _Writer:
    """A safetensors file that grows by one tensor at a time; a failure is kept, because peers wait."""

    def __init__(self, path: Path, header: bytes) -> None:
        self._file: BinaryIO | None = None
        self._failure: str | None = None
        try:
            self._file = path.open("xb")
            self._file.write(header)
        except FAILURES as error:
            self._failure = f"{path}: {error}"

    def add(self, tensor: Tensor) -> None:
        if self._file is None or self._failure is not None:
            return
        try:
            self._file.write(host_bytes(tensor))
        except FAILURES as error:
            self._failure = f"{self._file.name}: {error}"

    def close(self) -> str | None:
        """Makes the file durable; returns what went wrong, if anything did."""
        if self._file is not None:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            except FAILURES as error:
                self._failure = self._failure or f"{self._file.name}: {error}"
            self._file.close()
        return self._failure


def _header(members: Sequence[Entry], dtype: torch.dtype | None) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in members:
        start, end = end, end + _nbytes(entry, dtype)
        header[entry.key] = {
            "dtype": DTYPES[dtype or entry.param.dtype],
            "shape": list(entry.placement.global_shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _boxes_of_group(entries: Sequence[Entry]) -> list[list[tuple[Box, Box]]]:
    """By tensor-parallel rank and entry: the box of the global tensor, and where the rank's rows hold it."""
    mine = []
    for entry in entries:
        local = entry.placement.local
        mine.append((entry.placement.box, local.moved((-entry.rows.start,) + (0,) * (len(local.offset) - 1))))
    tp = collectives.tensor_parallel()
    everyone: list[Any] = [mine] * tp.size
    if tp.size > 1:
        dist.all_gather_object(everyone, mine, group=tp.group)
    return everyone


def _gather(entry: Entry, boxes: Sequence[tuple[Box, Box]]) -> Tensor:
    """The global tensor, on every rank of the tensor-parallel group together."""
    local = entry.param.detach()[entry.rows]
    if entry.replicated:
        return local
    tp = collectives.tensor_parallel()
    joined = collectives.gather(local.contiguous(), tp, 0) if tp.size > 1 else local
    full = local.new_empty(entry.placement.global_shape)
    for rows, (box, held) in zip(joined.chunk(tp.size), boxes, strict=True):
        view(full, box).copy_(view(rows, held))
    return full


def _finish(
    target: Path, files: Mapping[str, list[Entry]], config: Mapping[str, Any], dtype: torch.dtype
) -> None:
    folder, name = _partial(target), str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(
        json.dumps({**config, "torch_dtype": name}, indent=2) + "\n", encoding="utf-8"
    )
    if len(files) > 1:
        weights = {entry.key: file for file, members in files.items() for entry in members}
        total = sum(_nbytes(entry, dtype) for members in files.values() for entry in members)
        index = {"metadata": {"total_size": total}, "weight_map": weights}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if target.exists():
        shutil.rmtree(target)
    os.replace(folder, target)
