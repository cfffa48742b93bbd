"""Reads NxD's layout: weights, optimizer state (also sharded by ZeRO-1) and master weights, as canonical tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_lightning.checkpoint.boxes import Box, Placement, intersect, whole
from neuron_lightning.checkpoint.formats import nxd_order
from neuron_lightning.checkpoint.formats.contents import Contents, Entry, Piece, assembled, cast_entry, equal
from neuron_lightning.checkpoint.formats.nxd_files import NxdFiles, torch_sizes
from neuron_lightning.checkpoint.formats.nxd_layout import NxdLayout, Part, parts_of, placement
from neuron_lightning.checkpoint.state import GROUP_CHOICES
from neuron_lightning.errors import CheckpointError

_SMALL_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class NxdReading:
    """What NxD's files do not say.

    Attributes:
        rules, kv_order, vocab_size: as in :class:`NxdLayout`.
        kv_multiplier: ranks that share a key-value head; None: found out by comparing the ranks' keys.
        no_decay: words in names that exempt from weight decay; None: try the usual ones.
        query_rows: rows of all query projections together, where no ``o_proj`` beside them tells.
        tied: pairs of (ending of a name, ending of the name that it may be tied to).
        weights_only: leave optimizer state out.
    """

    rules: Mapping[str, str]
    kv_order: str = "tiled"
    vocab_size: int | None = None
    kv_multiplier: int | None = None
    no_decay: Sequence[str] | None = None
    query_rows: int | None = None
    tied: Sequence[tuple[str, str]] = (("lm_head.weight", "embed_tokens.weight"),)
    weights_only: bool = False


def read(path: Path, reading: NxdReading) -> Contents:
    """Describes an NxD checkpoint.

    Raises:
        CheckpointError: files are missing, hold code, or do not fit together or the rules.
    """
    files = NxdFiles(path)
    contents = Contents(tensors={}, trainer=files.trainer())
    for pp in range(files.sizes.pp):
        _Stage(files, pp, reading, contents).read()
    return contents


@dataclass
class _Local:
    """A parameter or buffer as the tensor-parallel ranks of one stage hold it."""

    entries: list[Entry]
    parts: list[Part]
    stored: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entries[0].shape


@dataclass
class _Found:
    """Pieces of a tensor of optimizer state."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[Piece]


@dataclass
class _Stage:
    """One pipeline stage."""

    files: NxdFiles
    pp: int
    reading: NxdReading
    contents: Contents
    locals: dict[str, _Local] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    optimizer: dict[str, _Found] = field(default_factory=dict)

    def read(self) -> None:
        raw = [self.files.model(tp, self.pp) for tp in range(self.files.sizes.tp)]
        entries = {name: self._entries(name, raw) for name in raw[0]}
        known = {name: found for name, found in entries.items() if found}
        self._find_tied(raw[0], known)
        self.layout = self._layout(known)
        for name, found in known.items():
            parts = parts_of(self.layout, name, found[0].shape, self._query_rows(name, known))
            self.locals[name] = _Local(found, parts, self.files.is_stored(raw[0][name], 0, self.pp))
        for name, local in self.locals.items():
            if name in self.aliases:
                for part, other in zip(local.parts, self.locals[self.aliases[name]].parts, strict=True):
                    self.contents.aliases[f"model/{part.name}"] = f"model/{other.name}"
            elif local.stored:
                self._add_weight(name, local)
        if not self.reading.weights_only:
            self._add_optimizers()
        self._check_complete()

    def _entries(self, name: str, raw: Sequence[Mapping[str, Any]]) -> list[Entry]:
        found: list[Entry] = []
        for tp, state in enumerate(raw):
            if name not in state:
                raise CheckpointError(
                    f"rank {tp} of {self.files.folder} has no {name}, which rank 0 has: it is damaged."
                )
            entry = self.files.entry(state[name], tp, self.pp)
            if entry is None:
                return []
            if found and entry.shape != found[0].shape:
                raise CheckpointError(
                    f"{name} is {entry.shape} on rank {tp} and {found[0].shape} on rank 0: not NxD's layout."
                )
            found.append(entry)
        return found

    def _find_tied(self, raw: Mapping[str, Any], known: Mapping[str, list[Entry]]) -> None:
        seen: dict[tuple[Any, ...], str] = {}
        for name in known:
            value = raw[name]
            key = _identity(value)
            if key is not None and key in seen:
                self.aliases[name] = seen[key]
            elif key is not None:
                seen[key] = name
        for ending, other_ending in self.reading.tied:
            for name in [n for n in known if n.endswith(ending) and n not in self.aliases]:
                for other in [n for n in known if n.endswith(other_ending)]:
                    stored = self.files.is_stored(raw[name], 0, self.pp) and self.files.is_stored(
                        raw[other], 0, self.pp
                    )
                    if stored and all(equal(a, b) for a, b in zip(known[name], known[other], strict=True)):
                        self.aliases[name] = other

    def _layout(self, known: Mapping[str, list[Entry]]) -> NxdLayout:
        tp, given = self.files.sizes.tp, self.reading.kv_multiplier
        return NxdLayout(
            rules=self.reading.rules,
            tp=tp,
            kv_multiplier=self._found_multiplier(known) if given is None else given,
            kv_order=self.reading.kv_order,
            vocab_size=self.reading.vocab_size,
        )

    def _found_multiplier(self, known: Mapping[str, list[Entry]]) -> int:
        """How many ranks hold equal keys, of the first layer that has some."""
        tp = self.files.sizes.tp
        trial = NxdLayout(rules=self.reading.rules, tp=tp)
        for name, found in known.items():
            if "weight" in name and trial.kind(name) in ("qkv", "rows kv"):
                keys = [_keys(entry, name, self._query_rows(name, known)) for entry in found]
                for m in (m for m in range(tp, 1, -1) if tp % m == 0):
                    layout = NxdLayout(
                        rules=trial.rules, tp=tp, kv_multiplier=m, kv_order=self.reading.kv_order
                    )
                    by_block: dict[int, list[Entry]] = {}
                    for rank, entry in enumerate(keys):
                        by_block.setdefault(layout.block("kv", rank), []).append(entry)
                    if all(equal(group[0], other) for group in by_block.values() for other in group[1:]):
                        return m
                return 1
        return 1

    def _query_rows(self, name: str, known: Mapping[str, list[Entry]]) -> int | None:
        if (total := self.reading.query_rows) is not None:
            return total // self.files.sizes.tp
        found = re.fullmatch(r"(.*\.)?qkv_proj\.(?:weight|bias)_qkv", name)
        beside = known.get(f"{found[1] or ''}o_proj.weight") if found else None
        return beside[0].shape[1] if beside else None

    def _add_weight(self, name: str, local: _Local) -> None:
        for part in local.parts:
            pieces: list[Piece] = []
            shape: tuple[int, ...] = ()
            for rank, entry in enumerate(local.entries):
                place = placement(self.layout, part, local.shape, rank)
                shape = place.global_shape
                pieces.append(_piece(place, entry, place.local))
            if part.dim is None:
                self._check_replicas(name, local)
            self._put(f"model/{part.name}", local.entries[0].dtype, shape, pieces)

    def _check_replicas(self, name: str, local: _Local) -> None:
        first, *others = local.entries
        if first.nbytes <= _SMALL_BYTES and not all(equal(first, other) for other in others):
            raise CheckpointError(
                f"{name} is taken to be whole on every rank, but the ranks hold different values: say how it is cut in a "
                "plan (--plan FILE)."
            )

    def _put(self, key: str, dtype: torch.dtype, shape: tuple[int, ...], pieces: list[Piece]) -> None:
        kept = [piece for piece in pieces if piece.box.numel or not piece.box.shape]
        self.contents.tensors[key] = assembled(key, dtype, shape, kept)

    def _add_optimizers(self) -> None:
        sizes = self.files.sizes
        first = self.files.optimizers(0, self.pp, 0)
        for index, state in enumerate(first):
            names = self._names_by_group(state)
            self._add_groups(index, state, names)
            numbers = [n for group in state["param_groups"] for n in group["params"]]
            by_number = dict(zip(numbers, [n for group in names for n in group], strict=True))
            for dp in range(sizes.dp):
                for tp in range(sizes.tp):
                    shard = self.files.optimizers(tp, self.pp, dp)[index]
                    if dp == 0 or "base_state" in shard:
                        _Shard(self, index, tp, dp, shard, by_number).collect()
        for key, found in self.optimizer.items():
            self._put(key, found.dtype, found.shape, found.pieces)

    def _names_by_group(self, state: Mapping[str, Any]) -> list[list[str]]:
        shapes = {n: torch_sizes(s) for n, s in state.get("shape_info", {}).items()}
        if "base_state" not in state:
            for number, values in state.get("state", {}).items():
                tensor = self.files.entry(values.get("exp_avg"), 0, self.pp, 0)
                if tensor is not None:
                    shapes[number] = tensor.shape
        known = {n: local.shape for n, local in self.locals.items() if n not in self.aliases}
        groups = [group["params"] for group in state["param_groups"]]
        return nxd_order.names_by_group(nxd_order.parameters_in(known), groups, shapes, self.reading.no_decay)

    def _add_groups(self, index: int, state: Mapping[str, Any], names: list[list[str]]) -> None:
        while len(self.contents.groups) <= index:
            self.contents.groups.append([])
        groups = self.contents.groups[index]
        for position, (group, members) in enumerate(zip(state["param_groups"], names, strict=True)):
            if position == len(groups):
                kept = {k: v for k, v in group.items() if k not in GROUP_CHOICES}
                groups.append({"options": kept, "params": []})
            groups[position]["params"] += members

    def _check_complete(self) -> None:
        """Weights that the files leave out are read from master weights."""
        for local in self.locals.values():
            for part in [] if local.stored else local.parts:
                master = self.contents.tensors.get(f"optimizer.0/{part.name}/master")
                if master is None:
                    raise CheckpointError(
                        f"{self.files.folder} holds neither the weight {part.name} nor a master weight of it."
                    )
                self.contents.tensors[f"model/{part.name}"] = cast_entry(master, local.entries[0].dtype)

    def collect(self, key: str, dtype: torch.dtype, shape: tuple[int, ...], piece: Piece) -> None:
        """Notes a piece of optimizer state."""
        self.optimizer.setdefault(key, _Found(dtype, shape, [])).pieces.append(piece)


@dataclass
class _Shard:
    """The optimizer state of one rank."""

    stage: _Stage
    index: int
    tp: int
    dp: int
    state: Mapping[str, Any]
    names: Mapping[int, str]

    def collect(self) -> None:
        values = self.state.get("base_state", self.state.get("state", {}))
        masters = self.state.get("sharded_master_weights", {})
        for number, name in self.names.items():
            local = self.stage.locals[name]
            entries = dict(values.get(number, {}))
            if number in masters:
                entries["master"] = masters[number]
            for key, value in entries.items():
                self._collect_value(local, key, value)

    def _collect_value(self, local: _Local, key: str, value: Any) -> None:
        entry = self.stage.files.entry(value, self.tp, self.stage.pp, self.dp)
        number = _number(value if entry is None else entry, local.shape)
        for part in local.parts:
            owner = f"optimizer.{self.index}/{part.name}"
            if number is not None:
                self.stage.contents.scalars.setdefault(owner, {})[key] = number
            elif entry is not None:
                self._collect_piece(local, part, f"{owner}/{key}", entry)

    def _collect_piece(self, local: _Local, part: Part, key: str, entry: Entry) -> None:
        place = placement(self.stage.layout, part, local.shape, self.tp)
        start = entry.shape[0] * self.dp if "base_state" in self.state else 0
        held = Box((start,) + (0,) * (len(local.shape) - 1), entry.shape)
        common = intersect(held, place.local)
        if common is None or tuple(entry.shape[1:]) != local.shape[1:]:
            return
        shift = tuple(g - o for g, o in zip(place.box.offset, place.local.offset, strict=True))
        moved = Placement(key, place.global_shape, common.moved(shift), common.within(held))
        self.stage.collect(key, entry.dtype, place.global_shape, _piece(moved, entry, moved.local))


def _piece(place: Placement, entry: Entry, local: Box) -> Piece:
    return Piece(place.box, lambda box: entry.read(box.moved(local.offset)))


def _keys(entry: Entry, name: str, query_rows: int | None) -> Entry:
    """The key rows of a query-key-value parameter."""
    if not name.endswith("_qkv") or query_rows is None:
        return entry
    size, rest = (entry.shape[0] - query_rows) // 2, (0,) * (len(entry.shape) - 1)
    return Entry(
        entry.dtype, (size, *entry.shape[1:]), lambda box: entry.read(box.moved((query_rows, *rest)))
    )


def _number(value: Any, shape: tuple[int, ...]) -> float | None:
    """A value of optimizer state that is one number for the parameter."""
    if isinstance(value, Entry):
        single = value.shape == () or (value.shape == (1,) and shape != (1,))
        return float(value.read(whole(value.shape))) if single else None
    return float(value) if isinstance(value, (int, float)) else None


def _identity(value: Any) -> tuple[Any, ...] | None:
    """Equal for two tensors that are the same memory, or the same file."""
    if isinstance(value, Tensor):
        return (
            (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride())
            if value.numel()
            else None
        )
    return ("file", getattr(value, "tid", None)) if hasattr(value, "tid") else None
