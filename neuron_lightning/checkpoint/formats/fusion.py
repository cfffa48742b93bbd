"""Parameters that a module fuses, and the canonical tensors that they are made of.

A layer that fuses query, key and value calls its parameter ``weight_qkv``; in a checkpoint it is ``weight_q``,
``weight_k`` and ``weight_v``. A column-parallel layer with ``stride=n`` has one ``weight``, which is ``weight_0`` to
``weight_<n-1>``. Formats that hold a module's own parameters, NxD's and Lightning's, need both directions.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from neuron_lightning.checkpoint.boxes import Box, intersect, view
from neuron_lightning.checkpoint.formats.contents import Entry
from neuron_lightning.errors import CheckpointError

_THIRD = re.compile(r"(.*(?:weight|bias))_([qkv])")
_NUMBERED = re.compile(r"(.*(?:weight|bias))_(\d+)")


def groups_of(
    names: Collection[str], parameters: Collection[str], fuse_qkv: bool = True
) -> dict[str, list[str]]:
    """The parameters of a module that is not sharded, and the canonical names in each, in order of their rows.

    Args:
        names: canonical names.
        parameters: names of the module's parameters, in their order, where they are known (from an optimizer's
            groups); they tell whether query, key and value are fused, and come first.
        fuse_qkv: the answer to that where they are not known.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_parameter(name, names, parameters, fuse_qkv), []).append(name)
    for local, members in found.items():
        members.sort(key=lambda n: _order(n) if n != local else 0)
    ordered = [name for name in parameters if name in found]
    return {name: found[name] for name in dict.fromkeys([*ordered, *found])}


def _parameter(name: str, names: Collection[str], parameters: Collection[str], fuse_qkv: bool) -> str:
    if third := _THIRD.fullmatch(name):
        stem = third[1]
        complete = all(f"{stem}_{letter}" in names for letter in "qkv")
        fused = f"{stem}_qkv" in parameters if parameters else fuse_qkv
        if complete and fused and name not in parameters:
            return f"{stem}_qkv"
        return name
    numbered = _NUMBERED.fullmatch(name)
    several = numbered is not None and all(f"{numbered[1]}_{i}" in names for i in (0, 1))
    return numbered[1] if numbered is not None and several and name not in parameters else name


def _order(name: str) -> int:
    if third := _THIRD.fullmatch(name):
        return "qkv".index(third[2])
    numbered = _NUMBERED.fullmatch(name)
    return int(numbered[2]) if numbered else 0


def joined(members: Sequence[Entry]) -> Entry:
    """Several tensors below one another as one. Raises :class:`CheckpointError` if they do not fit."""
    if len(members) == 1:
        return members[0]
    first = members[0]
    if any(m.shape[1:] != first.shape[1:] or m.dtype != first.dtype for m in members):
        raise CheckpointError(
            f"tensors of {[(m.dtype, m.shape) for m in members]} cannot be fused: their columns and dtypes must be equal."
        )
    starts = [0, *itertools.accumulate(m.shape[0] for m in members)]

    def read(box: Box) -> Tensor:
        result = torch.empty(box.shape, dtype=first.dtype, device="cpu")
        for member, start in zip(members, starts, strict=False):
            rest = (0,) * (len(first.shape) - 1)
            place = Box((start, *rest), member.shape)
            if (common := intersect(box, place)) is not None:
                view(result, common.within(box)).copy_(member.read(common.within(place)))
        return result

    return Entry(first.dtype, (starts[-1], *first.shape[1:]), read)


def part(entry: Entry, start: int, rows: int) -> Entry:
    """Rows of a tensor as a tensor of their own."""

    def read(box: Box) -> Tensor:
        return entry.read(box.moved((start,) + (0,) * (len(box.shape) - 1)))

    return Entry(entry.dtype, (rows, *entry.shape[1:]), read)


def split(tensors: Mapping[str, Entry], rows: Mapping[str, Sequence[tuple[str, int]]]) -> dict[str, Entry]:
    """Cuts fused tensors into the canonical ones.

    Args:
        tensors: by parameter name.
        rows: by parameter name the (canonical name, rows) in it, in order; of those that are not fused there may be
            none.
    """
    found: dict[str, Entry] = {}
    for name, entry in tensors.items():
        members = rows.get(name, [(name, 0)])
        if len(members) == 1:
            found[members[0][0]] = entry
            continue
        start = 0
        for canonical, count in members:
            found[canonical] = part(entry, start, count)
            start += count
    return found
