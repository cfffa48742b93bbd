"""Folders of ``torch.distributed.checkpoint``, through torch's own reader and writer, a slice at a time.

Keys are those of ``torch.distributed.checkpoint.state_dict`` under ``model`` and ``optimizer``: ``model.<name>``,
``optimizer.state.<name>.<key>``, ``optimizer.param_groups``; what a Trainer saves besides is typed JSON under
``neuron_lightning``. The folder's ``.metadata`` is a pickle: see :mod:`dcp_metadata`.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save

from neuron_lightning.checkpoint import typed_json
from neuron_lightning.checkpoint.boxes import Box, intersect, view, whole
from neuron_lightning.checkpoint.formats import dcp_metadata, pickled, staging
from neuron_lightning.checkpoint.formats.contents import (
    Contents,
    Counter,
    Entry,
    Piece,
    Progress,
    assembled,
    silent,
    slices,
)
from neuron_lightning.errors import CheckpointError

OURS = "neuron_lightning"
OUR_TENSORS = "neuron_lightning_tensors"
_CHUNK_BYTES = 4 << 20
"""Size of the chunks that tensors are cut into."""
_CACHE_BYTES = 16 << 20
"""Chunks that are kept while boxes of them are read: at least one, whatever its size."""
_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AssertionError,
)


class _Folder:
    """An opened folder: its metadata, and boxes of its tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Metadata = dcp_metadata.read(path)
        self._reader = FileSystemReader(path)
        self._reader.set_up_storage_reader(self.metadata, True)
        self._cache: dict[tuple[str, int], Tensor] = {}

    def described(self, key: str) -> TensorStorageMetadata:
        """What the metadata say of a tensor."""
        found = self.metadata.state_dict_metadata.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise CheckpointError(f"{self.path} holds no tensor {key}.")
        return found

    def tensor(self, key: str, box: Box) -> Tensor:
        """The elements of a box. A chunk is read as a whole and kept for the boxes that come next."""
        described = self.described(key)
        pieces = []
        for number, chunk in enumerate(described.chunks):
            held = Box(tuple(chunk.offsets), tuple(chunk.sizes))
            if intersect(box, held) is not None:
                pieces.append(Piece(held, self._chunk_reader(key, number)))
        shape = tuple(described.size)
        return assembled(key, described.properties.dtype, shape, pieces).read(box)

    def _chunk_reader(self, key: str, number: int) -> Callable[[Box], Tensor]:
        return lambda box: view(self._chunk(key, number), box)

    def _chunk(self, key: str, number: int) -> Tensor:
        if (key, number) not in self._cache:
            described = self.described(key)
            chunk = described.chunks[number]
            target = torch.empty(tuple(chunk.sizes), dtype=described.properties.dtype, device="cpu")
            while self._cache and sum(t.nbytes for t in self._cache.values()) + target.nbytes > _CACHE_BYTES:
                self._cache.pop(next(iter(self._cache)))
            self._read(key, create_read_items_for_chunk_list(key, described, [chunk]), _Into(target))
            self._cache[key, number] = target
        return self._cache[key, number]

    def value(self, key: str) -> Any:
        """What is stored under ``key`` beside the tensors, unpickled without code."""
        planner = _Into(torch.empty(0, device="cpu"))
        index = MetadataIndex(key)
        nothing = torch.Size((0,))
        item = ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)
        self._read(key, [item], planner)
        try:
            return torch.load(planner.stream, weights_only=True)
        except _ERRORS as error:
            raise CheckpointError(
                f"{self.path}: {key} is refused ({pickled.reason(error)}): it holds code or classes, which are never "
                "unpickled here."
            ) from error

    def _read(self, key: str, items: list[ReadItem], planner: _Into) -> None:
        try:
            self._reader.read_data(LoadPlan(items), planner).wait()
        except _ERRORS as error:
            raise CheckpointError(
                f"{self.path}: cannot read {key} ({type(error).__name__}: {error}): the folder is damaged."
            ) from error


class _Into(LoadPlanner):
    """Reads into one tensor, or one stream."""

    def __init__(self, target: Tensor) -> None:
        self._target = target
        self.stream = io.BytesIO()

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._target
        for dim, (start, extent) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, extent)
        return target

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.stream = value

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The tensor is a view of the target: nothing is left to do."""

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        raise CheckpointError("this planner reads single boxes; it plans nothing.")

    create_local_plan = create_global_plan = finish_plan = set_up_planner  # type: ignore[assignment]


def read(path: Path) -> Contents:
    """Describes a folder.

    Raises:
        CheckpointError: no such folder, damaged, or one whose metadata holds other classes than torch's.
    """
    folder = _Folder(path)
    contents = Contents(tensors={})
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for key, described in folder.metadata.state_dict_metadata.items():
        where = dcp_metadata.place(folder.metadata, key)
        if isinstance(described, BytesStorageMetadata):
            if len(where) > 1 and where[1] == "param_groups":
                _collect_group(groups.setdefault(_optimizer(where[0]), {}), where[2:], folder.value(key))
        elif where[0] != OUR_TENSORS:
            _add(contents, where, key, described, folder)
    if OURS in folder.metadata.state_dict_metadata:
        _add_trainer(contents, folder)
    for name in sorted(groups):
        ordered = [group for _, group in sorted(groups[name].items())]
        names = [list(group.pop("params", [])) for group in ordered]
        contents.groups.append([{"options": o, "params": n} for o, n in zip(ordered, names, strict=True)])
    return contents


def _collect_group(groups: dict[int, dict[str, Any]], rest: tuple[str, ...], value: Any) -> None:
    """Notes a parameter group: as one value, or (newer torch) an option at a time."""
    if not rest:
        groups.update({index: dict(group) for index, group in enumerate(value)})
    elif len(rest) == 2 and rest[0].isdigit():
        groups.setdefault(int(rest[0]), {})[rest[1]] = value


def _add(
    contents: Contents, where: tuple[str, ...], key: str, described: TensorStorageMetadata, folder: _Folder
) -> None:
    shape = tuple(described.size)
    entry = Entry(described.properties.dtype, shape, lambda box: folder.tensor(key, box))
    if where[0].startswith("optimizer") and len(where) >= 4 and where[1] == "state":
        owner = f"{_optimizer(where[0])}/{'.'.join(where[2:-1])}"
        if shape == ():
            contents.scalars.setdefault(owner, {})[where[-1]] = float(entry.full())
        else:
            contents.tensors[f"{owner}/{where[-1]}"] = entry
    elif where[0] in ("model", "state_dict"):
        contents.tensors[f"model/{'.'.join(where[1:])}"] = entry
    elif not where[0].startswith("optimizer"):
        contents.tensors[f"model/{key}"] = entry


def _optimizer(root: str) -> str:
    """``optimizer``, ``optimizer.1`` and ``optimizer_1`` as a prefix of ours."""
    return f"optimizer.{root.removeprefix('optimizer').strip('._') or '0'}"


def _add_trainer(contents: Contents, folder: _Folder) -> None:
    def tensor(name: str) -> Tensor:
        key = f"{OUR_TENSORS}.{name}"
        return folder.tensor(key, whole(folder.described(key).size))

    document = typed_json.decode(json.loads(folder.value(OURS)), tensor)
    contents.trainer = document["trainer"]
    contents.aliases = document["aliases"]


def write(target: Path, contents: Contents, *, overwrite: bool = False, progress: Progress = silent) -> None:
    """Writes a folder that ``torch.distributed.checkpoint.load`` reads, by torch's own writer.

    Raises:
        CheckpointError: something is in the way.
    """
    entries: dict[str, Entry] = {}
    state = _state_dict(contents, entries)
    count = Counter(progress, "write", sum(entry.nbytes for entry in entries.values()))
    with (
        staging.staged(target, folder=True, overwrite=overwrite) as partial,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled"
        )  # one process is what is meant
        writer = FileSystemWriter(partial, thread_count=1, sync_files=True)
        try:
            save(state, storage_writer=writer, planner=_Streaming(entries, count), no_dist=True)
        except CheckpointException as error:
            cause = error.failures[min(error.failures)][0]
            raise CheckpointError(f"could not write {target}: {cause}") from cause


def _state_dict(contents: Contents, entries: dict[str, Entry]) -> dict[str, Any]:
    """The nested dictionary that is saved, with tensors on ``meta``; what they hold goes into ``entries``."""

    def described(key: str, entry: Entry) -> Tensor:
        entries[key] = entry
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    model = {name: described(f"model.{name}", entry) for name, entry in contents.weights().items()}
    state: dict[str, Any] = {"model": model}
    for key, entry in contents.tensors.items():
        if key.startswith("optimizer."):
            root, name, leaf = _split(key)
            kept = state.setdefault(root, {"state": {}})["state"].setdefault(name, {})
            kept[leaf] = described(f"{root}.state.{name}.{leaf}", entry)
    for owner, numbers in contents.scalars.items():
        root, name, _ = _split(f"{owner}/")
        kept = state.setdefault(root, {"state": {}})["state"].setdefault(name, {})
        kept.update({leaf: torch.tensor(number, device="cpu") for leaf, number in numbers.items()})
    for index, groups in enumerate(contents.groups):
        written = [{**group["options"], "params": list(group["params"])} for group in groups]
        state.setdefault(_root(index), {"state": {}})["param_groups"] = written
    document, tensors = typed_json.encode({"trainer": contents.trainer, "aliases": contents.aliases})
    return {**state, OURS: json.dumps(document), OUR_TENSORS: tensors}


def _root(index: int) -> str:
    return "optimizer" if index == 0 else f"optimizer_{index}"


def _split(key: str) -> tuple[str, str, str]:
    """(root in the folder, name, state key) of ``optimizer.<index>/<name>/<state key>``."""
    head, _, rest = key.partition("/")
    name, _, leaf = rest.rpartition("/")
    return _root(int(head.removeprefix("optimizer."))), name, leaf


class _Streaming(DefaultSavePlanner):
    """Plans tensors in chunks, and reads each chunk when torch is about to write it."""

    def __init__(self, entries: Mapping[str, Entry], on_bytes: Callable[[int], None]) -> None:
        super().__init__(flatten_state_dict=True, dedup_save_to_lowest_rank=True)
        self._entries, self._on_bytes = entries, on_bytes

    def create_local_plan(self) -> SavePlan:
        items: list[WriteItem] = []
        for item in super().create_local_plan().items:
            entry = self._entries.get(item.index.fqn)
            items += [item] if entry is None else _chunks(item, entry)
        self.plan = SavePlan(items, planner_data=self.mappings)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        entry, data = self._entries.get(write_item.index.fqn), write_item.tensor_data
        if entry is None or data is None:
            return super().resolve_data(write_item)
        tensor = entry.read(Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))).contiguous()
        self._on_bytes(tensor.nbytes)
        return tensor


def _chunks(item: WriteItem, entry: Entry) -> list[WriteItem]:
    data = item.tensor_data
    boxes = list(slices(entry.shape, entry.dtype.itemsize, _CHUNK_BYTES))
    if data is None or len(boxes) <= 1:
        return [item]
    found = []
    for box in boxes:
        chunk = ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape))
        index = MetadataIndex(item.index.fqn, box.offset)
        found.append(
            WriteItem(index, WriteItemType.SHARD, None, TensorWriteData(chunk, data.properties, data.size))
        )
    return found
