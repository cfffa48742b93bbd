"""Brings stored boxes back into a module and its optimizers, whatever layout wrote them."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuron_lightning.checkpoint import boxes, state
from neuron_lightning.checkpoint.collector import uncollected
from neuron_lightning.checkpoint.host_copies import FetchedOptimizer, HostCopies, fetchable
from neuron_lightning.checkpoint.manifest import TensorRecord
from neuron_lightning.checkpoint.reader import Checkpoint
from neuron_lightning.checkpoint.state import Names
from neuron_lightning.checkpoint.transfer import Want
from neuron_lightning.errors import CheckpointError

_SHOWN = 5


@dataclasses.dataclass
class ModulePlan:
    """What goes where, and the names on one side only."""

    wants: list[Want]
    missing: list[str]
    unexpected: list[str]


@uncollected
def plan_module(
    checkpoint: Checkpoint,
    targets: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    tp_size: int,
    strict: bool,
    prefix: str = "model",
) -> ModulePlan:
    """Matches the names and shapes of a module and a checkpoint. Raises :class:`CheckpointError`."""
    names = Names(parameters)
    plan = ModulePlan([], [], [])
    known: set[str] = set()
    wrong: list[str] = []
    for group in state.tied_groups(targets):
        tensor = targets[group[0]]
        param = names.parameter(group[0], tensor)
        described = tensor if param is None else param
        choices = [boxes.placements(name, described, tp_size) for name in group]
        for position, place in enumerate(choices[0]):
            tied = [f"{prefix}/{choice[position].name}" for choice in choices]
            known.update(tied)
            stored = next((name for name in tied if checkpoint.manifest.resolve(name) is not None), None)
            record = None if stored is None else checkpoint.manifest.resolve(stored)
            if stored is None or record is None:
                plan.missing.append(place.name)
            elif record.shape != place.global_shape:
                wrong.append(
                    f"{place.name} is {record.shape} in the checkpoint and {place.global_shape} in the module"
                )
            else:
                into = boxes.view(tensor.detach(), place.local)
                plan.wants += checkpoint.wants(record, place.box, into)
    there = [*checkpoint.manifest.tensors, *checkpoint.manifest.aliases]
    plan.unexpected = [
        n.removeprefix(f"{prefix}/") for n in there if n.startswith(f"{prefix}/") and n not in known
    ]
    if wrong or (strict and (plan.missing or plan.unexpected)):
        raise _mismatch(checkpoint, wrong, plan)
    return plan


@uncollected
def plan_optimizers(
    checkpoint: Checkpoint,
    optimizers: Sequence[Any],
    parameters: Mapping[str, nn.Parameter],
    tp_size: int,
    copies: list[HostCopies],
) -> list[Want]:
    """Gives optimizers their hyper-parameters, numbers and room for their state; what is to be read into it.

    Args:
        checkpoint: to read from.
        optimizers: as many as were saved.
        parameters: the module's, by name.
        tp_size: tensor-parallel size.
        copies: filled with the host copies that are read into in place of device tensors, to be put back afterwards.

    Raises:
        CheckpointError: no optimizer state, or of other optimizers.
    """
    stored = checkpoint.read_trainer()["optimizers"]
    names, keys = Names(parameters), _keys_by_owner(checkpoint)
    if len(stored) != len(optimizers):
        raise CheckpointError(
            f"{checkpoint.folder} holds the state of {len(stored)} optimizer(s), but {len(optimizers)} are to be loaded: "
            "resume with the optimizers of the run that wrote it, or load its weights only."
        )
    for index, optimizer in enumerate(optimizers):
        _check_groups(checkpoint, index, stored[index], state.group_options(optimizer, parameters))
    wants: list[Want] = []
    for index, optimizer in enumerate(optimizers):
        sources = [
            _Stored(checkpoint, keys, index, piece, names.name_of(piece.param), tp_size)
            for piece in state.export(optimizer)
        ]
        if rooms := [room for found in sources if (room := found.with_room()) is not None]:
            optimizer.import_state(rooms)
        target = optimizer
        if fetchable(optimizer):
            copies.append(HostCopies(optimizer.held_tensors()))
            target = FetchedOptimizer(optimizer, copies[-1])
        for piece, found in zip(state.export(target), sources, strict=True):
            wants += found.wants(piece)
        for group, saved in zip(optimizer.param_groups, stored[index], strict=True):
            group.update({k: v for k, v in saved["options"].items() if k not in state.GROUP_CHOICES})
    return wants


class _Stored:
    """What a checkpoint holds of one piece of an optimizer's state. Raises :class:`CheckpointError`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        keys: Mapping[str, set[str]],
        index: int,
        piece: Any,
        name: str,
        tp_size: int,
    ) -> None:
        self._checkpoint, self._piece = checkpoint, piece
        self._places = boxes.flat_placements(name, piece.param, tp_size, piece.start, piece.stop)
        canonical = [p.name for p in boxes.placements(name, piece.param, tp_size)]
        self._owners = [f"optimizer.{index}/{c}" for c in dict.fromkeys(canonical)]
        held = set().union(*(keys.get(owner, ()) for owner in self._owners))
        sources = {key: f"optimizer.{index}/{{}}/{key}" for key in sorted(held)}
        if "master" not in piece.tensors:
            sources.pop("master", None)
        else:
            sources.setdefault("master", "model/{}")
        self._records = {key: self._find(source) for key, source in sources.items()}

    def with_room(self) -> Any | None:
        """The piece with its stored numbers, and tensors that are yet to be filled; None if it has just those.

        What nobody stores (padding) keeps its present value, or is zero. Master weights are always there.
        """
        length, present = self._piece.stop - self._piece.start, self._piece.tensors
        stored = self._checkpoint.manifest.scalars
        scalars = dict(next((stored[owner] for owner in self._owners if owner in stored), {}))
        keys = self._records.keys() - {"master"}
        if keys == present.keys() - {"master"} and scalars == dict(self._piece.scalars):
            return None
        tensors = {}
        for key in keys:
            dtype = self._records[key][0].dtype if self._records[key] else torch.float32
            tensors[key] = (
                present[key] if key in present else torch.zeros((), dtype=dtype, device="cpu").expand(length)
            )
        return dataclasses.replace(self._piece, tensors=tensors, scalars=scalars)

    def wants(self, piece: Any) -> list[Want]:
        """What to read into the live tensors of the piece."""
        found = []
        for key, records in self._records.items():
            for place, record in zip(self._places, records, strict=True):
                flat = piece.tensors[key].detach()
                into = boxes.flat_view(flat, piece.start, tuple(piece.param.shape), place.local)
                found += self._checkpoint.wants(record, place.box, into)
        return found

    def _find(self, source: str) -> list[TensorRecord]:
        """The stored tensor for each place of the piece."""
        records = []
        for place in self._places:
            record = self._checkpoint.manifest.resolve(source.format(place.name))
            if record is None or record.shape != place.global_shape:
                found = "nothing" if record is None else f"shape {record.shape}"
                raise CheckpointError(
                    f"{self._checkpoint.folder} holds {found} for {source.format(place.name)}, whose shape is "
                    f"{place.global_shape}: it is a checkpoint of another model or optimizer."
                )
            records.append(record)
        return records


def _keys_by_owner(checkpoint: Checkpoint) -> dict[str, set[str]]:
    """State keys that the checkpoint holds, by ``optimizer.<index>/<parameter>``."""
    found: dict[str, set[str]] = defaultdict(set)
    for stored in checkpoint.manifest.tensors:
        owner, _, key = stored.rpartition("/")
        found[owner].add(key)
    return found


def _check_groups(
    checkpoint: Checkpoint,
    index: int,
    saved: Sequence[Mapping[str, Any]],
    present: Sequence[Mapping[str, Any]],
) -> None:
    if len(saved) != len(present):
        raise CheckpointError(
            f"optimizer {index} has {len(present)} parameter group(s), the checkpoint {checkpoint.folder} {len(saved)}: "
            "resume with the groups of the run that wrote it."
        )
    for number, (old, new) in enumerate(zip(saved, present, strict=True)):
        if different := sorted(set(old["params"]) ^ set(new["params"])):
            where = "the checkpoint" if different[0] in old["params"] else "the optimizer"
            raise CheckpointError(
                f"parameter group {number} of optimizer {index} differs from the checkpoint {checkpoint.folder}: "
                f"{different[0]} is in it only in {where} ({len(different)} such names)."
            )
        for key, value in old["options"].items():
            if not _may_become(new["options"].get(key), value):
                shown = (
                    repr(value)[:100] if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
                )
                raise CheckpointError(
                    f"parameter group {number} of optimizer {index} has {key}={shown} in the checkpoint "
                    f"{checkpoint.folder}, and {new['options'][key]!r} now, of another type: it is damaged, or of "
                    "another optimizer."
                )


def _may_become(present: Any, stored: Any) -> bool:
    """Whether a hyper-parameter can take a stored value: one of its own kind, or of any if either is None."""
    if present is None or stored is None:
        return True
    if isinstance(present, (list, tuple)):
        return (
            isinstance(stored, (list, tuple))
            and len(stored) == len(present)
            and all(itertools.starmap(_may_become, zip(present, stored, strict=True)))
        )
    if isinstance(present, (int, float, Tensor)) and not isinstance(present, bool):
        is_number = isinstance(stored, (int, float)) and not isinstance(stored, bool)
        return is_number or (isinstance(stored, Tensor) and stored.numel() == 1)
    return isinstance(stored, type(present))


def _mismatch(checkpoint: Checkpoint, wrong: list[str], plan: ModulePlan) -> CheckpointError:
    parts = [f"{checkpoint.folder} does not fit this module."]
    lists = (
        ("other shapes", wrong),
        ("missing in the checkpoint", plan.missing),
        ("unexpected in it", plan.unexpected),
    )
    for title, found in lists:
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            parts.append(f"{len(found)} {title}: {', '.join(found[:_SHOWN])}{more}.")
    parts.append("Load it into the model that wrote it, or use strict=False for names on one side only.")
    return CheckpointError(" ".join(parts))
