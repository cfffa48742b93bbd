"""What one rank writes: which boxes, in which files, in which order. Worked out once and kept while nothing moves."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuron_lightning.checkpoint import boxes, tensor_file, typed_json
from neuron_lightning.checkpoint.boxes import Box
from neuron_lightning.checkpoint.collector import uncollected
from neuron_lightning.checkpoint.exchange import Ranks
from neuron_lightning.checkpoint.state import LocalState, Source
from neuron_lightning.errors import CheckpointError

STATE_DICT_TYPES = ("deduped", "sharded")
TRAINER_FILE = "trainer.json"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one rank wants in the checkpoint.

    Attributes:
        target: path or URL of the checkpoint to create.
        describe: makes the local state, given an earlier one if there is one; may fail on one rank only.
        trainer: makes what rank 0 writes; may fail on one rank only.
        rank: state of this rank alone, or None.
        step, epoch, data: copied into the manifest.
        mesh: ranks by axis.
        state_dict_type: ``deduped`` or ``sharded``.
    """

    target: str
    describe: Callable[[LocalState | None], LocalState]
    trainer: Callable[[], Mapping[str, Any]]
    rank: Mapping[str, Any] | None
    step: int | None
    epoch: int | None
    data: Any
    mesh: Mapping[str, int]
    state_dict_type: str


@dataclass(frozen=True)
class Item:
    """A box that this rank writes.

    Attributes:
        key: its name within the file.
        name: of the global tensor.
        box: the elements.
        source: number of the source that holds them.
        local: the same elements, counted from where the source starts.
    """

    key: str
    name: str
    box: Box
    source: int
    local: Box


@dataclass(frozen=True)
class FilePlan:
    """A file of tensors: its name (without what the storage adds), kind and layout, and the items in file order."""

    name: str
    kind: str
    layout: tensor_file.Layout
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Document:
    """A value as typed JSON, and the tensors that it refers to."""

    name: str
    kind: str
    text: bytes
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Share:
    """All that this rank writes in one save.

    Attributes:
        files: the files of tensors.
        views: for each of them the data of its items, in order: views of live memory.
        documents: trainer and rank state.
        facts: dtype and global shape of the tensors that this rank holds.
        aliases, scalars: as in :class:`~neuron_lightning.checkpoint.state.LocalState`.
    """

    files: tuple[FilePlan, ...]
    views: Sequence[Sequence[Tensor]]
    documents: Sequence[Document]
    facts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    aliases: Mapping[str, str]
    scalars: Mapping[str, Mapping[str, float]]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(file.layout.size for file in self.files)


def file_name(rank: int, kind: str, ending: str) -> str:
    """``rank-00003.model.safetensors`` and the like."""
    return f"rank-{rank:05d}.{kind}.{ending}"


class Planner:
    """Plans saves. What is to be written where is worked out anew only when some rank's layout has changed, and
    which memory that is only when a tensor of this rank has moved."""

    def __init__(self) -> None:
        self._local: LocalState | None = None
        self._signature: list[Any] = []
        self._files: tuple[FilePlan, ...] = ()
        self._views: list[list[Tensor]] = []

    @uncollected
    def plan(self, request: Request, ranks: Ranks, what: str) -> Share:
        """This rank's part of a save. Collective. Raises :class:`CheckpointError` on all ranks."""
        if request.state_dict_type not in STATE_DICT_TYPES:
            raise CheckpointError(
                f"state_dict_type must be one of {', '.join(STATE_DICT_TYPES)}, not {request.state_dict_type!r}."
            )
        kept: list[tuple[LocalState, list[Document]]] = []

        def look() -> tuple[Any, bool]:
            local = request.describe(self._local)
            kept.append((local, _documents(request, ranks.rank)))
            return (request.target, request.step, request.state_dict_type), self._is_same(local, request)

        outcomes = ranks.together(what, look)
        _check_agreement([wish for wish, _ in outcomes])
        local, documents = kept[0]
        old, self._local = self._local, None
        if not all(same for _, same in outcomes):
            self._files = _assign(local, request.state_dict_type, ranks)
            self._signature = _signature(local, request.state_dict_type)
            old = None
        if old is None or old.sources is not local.sources:
            self._views = [_views(file, local.sources) for file in self._files]
        self._local = local
        facts = {s.name: (s.tensor.dtype, s.global_shape) for s in local.sources}
        return Share(self._files, self._views, documents, facts, local.aliases, local.scalars)

    def _is_same(self, local: LocalState, request: Request) -> bool:
        if self._local is None:
            return False
        if local.sources is self._local.sources and self._signature[0] == request.state_dict_type:
            return True
        return _signature(local, request.state_dict_type) == self._signature


def _views(file: FilePlan, sources: Sequence[Source]) -> list[Tensor]:
    return [boxes.view(sources[item.source].tensor, item.local) for item in file.items]


def _check_agreement(wishes: Sequence[Any]) -> None:
    for rank, wish in enumerate(wishes):
        if wish != wishes[0]:
            raise CheckpointError(
                f"the ranks do not save the same checkpoint: (path, step, state_dict_type) is {wishes[0]} on rank 0 and "
                f"{wish} on rank {rank}; every rank must call the save together, with equal arguments."
            )


def _signature(local: LocalState, state_dict_type: str) -> list[Any]:
    """Equal for two states that are written in the same way."""
    return [
        state_dict_type,
        *((s.name, s.global_shape, s.box, s.tensor.dtype, s.spread) for s in local.sources),
    ]


def _documents(request: Request, rank: int) -> list[Document]:
    found, trainer = [], request.trainer()
    if rank == 0:
        found.append(_document(trainer, "trainer", "trainer", TRAINER_FILE))
    if request.rank is not None:
        found.append(_document(request.rank, "rank", f"rank.{rank}", file_name(rank, "state", "json")))
    return found


def _document(value: Any, kind: str, prefix: str, name: str) -> Document:
    data, tensors = typed_json.encode(value, where=f"{kind} state", tensor_prefix=prefix)
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
    return Document(name, kind, text, {key: t.detach().to("cpu", copy=True) for key, t in tensors.items()})


def _assign(local: LocalState, state_dict_type: str, ranks: Ranks) -> tuple[FilePlan, ...]:
    """What this rank writes, by file. Collective."""
    if state_dict_type == "deduped":
        held = ranks.gather([source.holding for source in local.sources])
        mine = boxes.assign(held)[ranks.rank]
    else:
        mine = [(source.name, source.box) for source in local.sources if source.box.numel]
    by_name: dict[str, list[int]] = defaultdict(list)
    for index, source in enumerate(local.sources):
        by_name[source.name].append(index)
    seen: dict[str, int] = defaultdict(int)
    by_kind: dict[str, list[Item]] = defaultdict(list)
    for name, box in mine:
        index = next(i for i in by_name[name] if boxes.intersect(local.sources[i].box, box) == box)
        key = f"{name}#{seen[name]}" if seen[name] else name
        seen[name] += 1
        source = local.sources[index]
        by_kind[source.kind].append(Item(key, name, box, index, box.within(source.box)))
    return tuple(_file(kind, items, local, ranks.rank) for kind, items in sorted(by_kind.items()))


def _file(kind: str, items: Sequence[Item], local: LocalState, rank: int) -> FilePlan:
    entries = [(item.key, local.sources[item.source].tensor.dtype, item.box.shape) for item in items]
    layout = tensor_file.Layout.of(entries)
    by_key = {item.key: item for item in items}
    ordered = tuple(by_key[entry.key] for entry in layout.entries)
    return FilePlan(file_name(rank, kind, "safetensors"), kind, layout, ordered)
