"""Brings stored boxes back into a module and its optimizers, whatever layout wrote them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuron_lightning.checkpoint import boxes, state
from neuron_lightning.checkpoint.boxes import Placement
from neuron_lightning.checkpoint.plan import TRAINER_FILE
from neuron_lightning.checkpoint.reader import Checkpoint
from neuron_lightning.checkpoint.state import Names
from neuron_lightning.errors import CheckpointError

Progress = Callable[[str, int, int], None]
_SHOWN = 5


@dataclasses.dataclass
class ModulePlan:
    """What goes where: (placement, stored name, local tensor), and the names on one side only."""

    copies: list[tuple[Placement, str, Tensor]]
    missing: list[str]
    unexpected: list[str]


def plan_module(
    checkpoint: Checkpoint,
    targets: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    tp_size: int,
    strict: bool,
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
            tied = [f"model/{choice[position].name}" for choice in choices]
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
                plan.copies.append((place, stored, tensor.detach()))
    there = [*checkpoint.manifest.tensors, *checkpoint.manifest.aliases]
    plan.unexpected = [n.removeprefix("model/") for n in there if n.startswith("model/") and n not in known]
    if wrong or (strict and (plan.missing or plan.unexpected)):
        raise _mismatch(checkpoint, wrong, plan)
    return plan


def copy_module(checkpoint: Checkpoint, plan: ModulePlan, progress: Progress) -> None:
    """Copies what was planned, in place."""
    total = sum(place.box.numel * tensor.element_size() for place, _, tensor in plan.copies)
    done = 0
    progress("read", 0, total)
    with torch.no_grad():
        for place, stored, tensor in plan.copies:
            record = checkpoint.manifest.resolve(stored)
            if record is not None:
                checkpoint.read_box(record, place.box, boxes.view(tensor, place.local))
            done += place.box.numel * tensor.element_size()
            progress("read", done, total)


def load_optimizers(
    checkpoint: Checkpoint,
    optimizers: Sequence[Any],
    parameters: Mapping[str, nn.Parameter],
    tp_size: int,
    progress: Progress,
) -> None:
    """Gives optimizers their state and hyper-parameters. Raises :class:`CheckpointError`."""
    stored = checkpoint.read_document(TRAINER_FILE)["optimizers"]
    names = Names(parameters)
    if len(stored) != len(optimizers):
        raise CheckpointError(
            f"{checkpoint.folder} holds the state of {len(stored)} optimizer(s), but {len(optimizers)} are to be loaded: "
            "resume with the optimizers of the run that wrote it, or load its weights only."
        )
    for index, optimizer in enumerate(optimizers):
        _check_groups(checkpoint, index, stored[index], state.group_options(optimizer, parameters))
        pieces = state.export(optimizer)
        total = sum(piece.stop - piece.start for piece in pieces)
        done, loaded = 0, []
        for piece in pieces:
            loaded.append(_load_piece(checkpoint, index, piece, names.name_of(piece.param), tp_size))
            done += piece.stop - piece.start
            progress("read", done, total)
        optimizer.import_state(loaded)
        for group, saved in zip(optimizer.param_groups, stored[index], strict=True):
            group.update(saved["options"])


def _load_piece(checkpoint: Checkpoint, index: int, piece: Any, name: str, tp_size: int) -> Any:
    """The piece with the stored tensors and scalars of its parameter."""
    canonical = [p.name for p in boxes.placements(name, piece.param, tp_size)]
    owners = [f"optimizer.{index}/{c}" for c in dict.fromkeys(canonical)]
    sources = {key: f"optimizer.{index}/{{}}/{key}" for key in _stored_keys(checkpoint, owners)}
    if "master" not in piece.tensors:
        sources.pop("master", None)
    else:
        sources.setdefault("master", "model/{}")
    places = boxes.flat_placements(name, piece.param, tp_size, piece.start, piece.stop)
    tensors = {key: _load_flat(checkpoint, piece, places, key, source) for key, source in sources.items()}
    scalars = next((checkpoint.manifest.scalars[o] for o in owners if o in checkpoint.manifest.scalars), {})
    return dataclasses.replace(piece, tensors=tensors, scalars=dict(scalars))


def _stored_keys(checkpoint: Checkpoint, owners: Sequence[str]) -> list[str]:
    """State keys of a parameter that the checkpoint holds."""
    split = (stored.rpartition("/") for stored in checkpoint.manifest.tensors)
    return sorted({key for owner, _, key in split if owner in owners})


def _load_flat(
    checkpoint: Checkpoint, piece: Any, places: Sequence[Placement], key: str, source: str
) -> Tensor:
    """One flat state tensor of a piece; what nobody stores (padding) keeps its present value, or is zero."""
    flat = piece.tensors.get(key)
    records = [checkpoint.manifest.resolve(source.format(place.name)) for place in places]
    dtype = next((record.dtype for record in records if record is not None), torch.float32)
    loaded = state.dense_like(flat, piece.stop - piece.start, dtype)
    for place, record in zip(places, records, strict=True):
        if record is None or record.shape != place.global_shape:
            found = "nothing" if record is None else f"shape {record.shape}"
            raise CheckpointError(
                f"{checkpoint.folder} holds {found} for {source.format(place.name)}, whose shape is {place.global_shape}: "
                "it is a checkpoint of another model or optimizer."
            )
        into = boxes.flat_view(loaded, piece.start, tuple(piece.param.shape), place.local)
        checkpoint.read_box(record, place.box, into)
    return loaded


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
