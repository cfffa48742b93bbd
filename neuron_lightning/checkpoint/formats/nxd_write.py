"""Writes NxD's layout: weights, optimizer state (also sharded by ZeRO-1) and master weights.

One rank's file at a time is put together from slices in scratch files on disk, so that memory is needed for a slice
(without xser, disk space for the file once more).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_lightning.checkpoint.boxes import Box, Placement, intersect, view
from neuron_lightning.checkpoint.formats import fusion, pickled, plain, staging
from neuron_lightning.checkpoint.formats.contents import Contents, Counter, Entry, Progress, silent, slices
from neuron_lightning.checkpoint.formats.nxd_layout import NxdLayout, Part, parts_of, placement
from neuron_lightning.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class NxdWriting:
    """How to write NxD's layout.

    Attributes:
        layout: how parameters are cut.
        dp: data-parallel size, which counts under ZeRO-1.
        zero1: whether optimizer state is sharded over the data-parallel ranks.
        xser: whether each tensor has a file of its own.
        core: the folder of ``save_checkpoint`` (``<target>`` is the tag), instead of Lightning's.
        fuse_qkv: whether query, key and value are one parameter, where the optimizer's groups do not tell.
    """

    layout: NxdLayout
    dp: int = 1
    zero1: bool = False
    xser: bool = True
    core: bool = False
    fuse_qkv: bool = True


def write(
    target: Path,
    contents: Contents,
    writing: NxdWriting,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> None:
    """Writes a folder in NxD's layout.

    Raises:
        CheckpointError: something is in the way, or a tensor cannot be cut over that many ranks.
    """
    parameters = _parameters(contents, writing)
    layout, dp = writing.layout, writing.dp if writing.zero1 else 1
    files = dp if writing.zero1 and not writing.core else 1
    count = Counter(progress, "write", _total(contents, files))
    with (
        staging.staged(target, folder=True, overwrite=overwrite) as folder,
        pickled.scratch(target.parent) as scratch,
    ):
        for tp, rank_dp in itertools.product(range(layout.tp), range(dp)):
            _Rank(folder, contents, writing, parameters, tp, rank_dp, scratch, count).write()
        if writing.core:
            _write_markers(folder, contents)


def _total(contents: Contents, copies: int) -> int:
    return sum(e.nbytes * (1 if n.startswith("optimizer.") else copies) for n, e in contents.tensors.items())


@dataclass(frozen=True)
class _Parameter:
    """A parameter of the module on a rank."""

    name: str
    shape: tuple[int, ...]
    parts: list[Part]


def _parameters(contents: Contents, writing: NxdWriting) -> list[_Parameter]:
    weights = contents.weights()
    known = contents.parameter_names()
    fused = fusion.groups_of(weights, known, writing.fuse_qkv)
    return [
        _parameter(name, [weights[m] for m in members], writing.layout) for name, members in fused.items()
    ]


def _parameter(name: str, members: Sequence[Entry], layout: NxdLayout) -> _Parameter:
    """The local shape of a parameter, and its parts, from its canonical tensors."""
    kind, shape = layout.kind(name), list(members[0].shape)
    how, _, order = kind.partition(" ")
    dim = {"columns": 1, "whole": None}.get(how, 0)
    if dim is None or dim >= len(shape):
        return _Parameter(name, tuple(shape), parts_of(layout, name, shape, None))
    orders = ["q", "kv", "kv"] if kind == "qkv" else [order if not order.isdigit() else ""] * len(members)
    sizes = [
        _per_rank(name, member.shape[dim], layout.blocks(o), pad=how == "vocab")
        for member, o in zip(members, orders, strict=True)
    ]
    if how == "rows" and order.isdigit() and len(members) != int(order):
        raise CheckpointError(f"{name} is fused from {len(members)} tensors, the plan says {order}.")
    shape[dim] = sum(sizes)
    parts = parts_of(layout, name, shape, sizes[0])
    limited = [replace(part, limit=m.shape[dim]) for part, m in zip(parts, members, strict=True)]
    return _Parameter(name, tuple(shape), limited)


def _per_rank(name: str, size: int, blocks: int, *, pad: bool) -> int:
    if size % blocks and not pad:
        raise CheckpointError(
            f"{name} has {size} rows or columns, which {blocks} ranks cannot share equally: choose a tensor-parallel size "
            "that divides it (and for key-value heads a kv_size_multiplier)."
        )
    return -(-size // blocks)


@dataclass
class _Rank:
    """What one rank writes."""

    folder: Path
    contents: Contents
    writing: NxdWriting
    parameters: Sequence[_Parameter]
    tp: int
    dp: int
    scratch: pickled.Scratch
    count: Callable[[int], None]

    def write(self) -> None:
        stem = f"tp_rank_{self.tp:02d}_pp_rank_00"
        if self.writing.core:
            core = f"dp_rank_{{:02d}}_{stem}.pt"
            if self.dp == 0:
                self._save(self.folder / "model" / core.format(0), self._model)
            if self.contents.groups:
                self._save(self.folder / "optim" / core.format(self.dp), lambda put: self._optimizer(0, put))
            return
        name = stem + (f"_dp_rank_{self.dp:02d}" if self.writing.zero1 else "")
        path = self.folder / name if self.writing.xser else self.folder / name / "checkpoint.pt"
        self._save(path, self._lightning)

    def _save(self, path: Path, build: Callable[[Callable[[Tensor], Any]], Any]) -> None:
        path.parent.mkdir(exist_ok=True)
        if not self.writing.xser:
            pickled.save(build(lambda tensor: tensor), path)
            return
        tensors = path.with_name(path.name + ".tensors")
        tensors.mkdir()
        info: dict[int, dict[str, Any]] = {}

        def put(tensor: Tensor) -> pickled.TensorReference:
            number = len(info)
            info[number] = {"dtype": tensor.dtype, "shape": tensor.shape, "expert_model_parallel": False}
            pickled.save(tensor, tensors / f"tensor_{number}.pt")
            return pickled.TensorReference(number)

        pickled.save(build(put), path)
        if self.writing.core:
            pickled.save(info, path.with_name(path.name + ".info.pt"))

    def _lightning(self, put: Callable[[Tensor], Any]) -> dict[str, Any]:
        return {
            **plain.lightning_keys(self.contents.trainer),
            "state_dict": self._model(put),
            "optimizer_states": [self._optimizer(i, put) for i in range(len(self.contents.groups))],
        }

    def _model(self, put: Callable[[Tensor], Any]) -> dict[str, Any]:
        state = {p.name: put(self._local(p, "model/{}")) for p in self.parameters}
        tied = self.contents.weight_aliases()
        names = {part.name: p.name for p in self.parameters for part in p.parts}
        state.update({alias: state[names[name]] for alias, name in tied.items() if names[name] == name})
        return state

    def _optimizer(self, index: int, put: Callable[[Tensor], Any]) -> dict[str, Any]:
        by_name = {p.name: p for p in self.parameters}
        groups, number = [], 0
        values: dict[int, dict[str, Any]] = {}
        masters: dict[int, Any] = {}
        shapes: dict[int, torch.Size] = {}
        for group in self.contents.groups[index]:
            numbers = []
            for name in group["params"]:
                param = by_name.get(name)
                if param is None:
                    raise CheckpointError(
                        f"the optimizer's groups name {name}, which cannot be put together from the weights: convert the "
                        "weights only (--weights-only)."
                    )
                values[number], master = self._state(index, param, put)
                shapes[number] = torch.Size(param.shape)
                if master is not None:
                    masters[number] = master
                numbers.append(number)
                number += 1
            groups.append({**plain.value(group["options"]), "params": numbers})
        values = {number: state for number, state in values.items() if state}
        if not self.writing.zero1:
            return {"state": values, "param_groups": groups}
        sharded = {"base_state": values, "shape_info": shapes}
        if masters:
            sharded["sharded_master_weights"] = masters
        return {"state": {}, "param_groups": groups, **sharded}

    def _state(
        self, index: int, param: _Parameter, put: Callable[[Tensor], Any]
    ) -> tuple[dict[str, Any], Any]:
        owner = f"optimizer.{index}/{param.parts[0].name}"
        numbers = self.contents.scalars.get(owner, {})
        state: dict[str, Any] = {key: torch.tensor(number, device="cpu") for key, number in numbers.items()}
        master = None
        for key in _state_keys(self.contents, owner):
            if key == "master" and not self.writing.zero1:
                continue
            value = put(self._local(param, f"optimizer.{index}/{{}}/{key}"))
            if key == "master":
                master = value
            else:
                state[key] = value
        return state, master

    def _local(self, param: _Parameter, source: str) -> Tensor:
        """This rank's tensor of a parameter, or of a state of it; optimizer state as this rank's shard."""
        entries = [self._source(source.format(part.name)) for part in param.parts]
        shape, first = list(param.shape), 0
        if self.writing.zero1 and source.startswith("optimizer.") and shape:
            shape[0] = -(-shape[0] // self.writing.dp)
            first = shape[0] * self.dp
        held = Box((first,) + (0,) * (len(shape) - 1) if shape else (), tuple(shape))
        local = self.scratch.empty(entries[0].dtype, tuple(shape))
        for part, entry in zip(param.parts, entries, strict=True):
            place = placement(self.writing.layout, part, param.shape, self.tp)
            if (common := intersect(held, place.local)) is not None:
                self._fill(view(local, common.within(held)), entry, place, common)
        return local

    def _fill(self, into: Tensor, entry: Entry, place: Placement, common: Box) -> None:
        shift = tuple(g - o for g, o in zip(place.box.offset, place.local.offset, strict=True))
        wanted = common.moved(shift)
        for box in slices(wanted.shape, entry.dtype.itemsize):
            view(into, box).copy_(entry.read(box.moved(wanted.offset)))
            self.count(math.prod(box.shape) * entry.dtype.itemsize)

    def _source(self, key: str) -> Entry:
        if key not in self.contents.tensors:
            raise CheckpointError(f"the checkpoint lacks {key}: convert the weights only (--weights-only).")
        return self.contents.tensors[key]


def _state_keys(contents: Contents, owner: str) -> list[str]:
    return [key.removeprefix(f"{owner}/") for key in contents.tensors if key.rpartition("/")[0] == owner]


def _write_markers(folder: Path, contents: Contents) -> None:
    trainer: Mapping[str, Any] = plain.value(contents.trainer)
    if schedulers := trainer.get("lr_schedulers"):
        pickled.save(schedulers[0], folder / "scheduler.pt")
    known = trainer.get("user_content")
    content = {k: trainer[k] for k in ("epoch", "global_step") if k in trainer} if known is None else known
    if content:
        pickled.save(content, folder / "user_content.pt")
    for name in ("checkpoint", "done"):
        (folder / name).write_text("1", encoding="ascii")
