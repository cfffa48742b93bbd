"""Loads a checkpoint of any format into a module and its optimizers, at any layout.

What our own folders have, names, shapes and boxes, every format has once it is described as :class:`Contents`; so the
same code brings it into local shards, and each rank reads its own slices only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuron_lightning.checkpoint import boxes, restore, state, storage
from neuron_lightning.checkpoint.boxes import Box
from neuron_lightning.checkpoint.exchange import Ranks
from neuron_lightning.checkpoint.formats import fusion, lightning_file
from neuron_lightning.checkpoint.formats.contents import (
    Contents,
    Counter,
    Entry,
    Progress,
    silent,
    slices,
    split_key,
)
from neuron_lightning.checkpoint.host_copies import HostCopies, landing
from neuron_lightning.checkpoint.manifest import Manifest, StoredBox, TensorRecord
from neuron_lightning.checkpoint.reader import Checkpoint
from neuron_lightning.checkpoint.state import Names
from neuron_lightning.checkpoint.transfer import Want
from neuron_lightning.errors import CheckpointError
from neuron_lightning.parallel.mesh import current as current_mesh
from neuron_lightning.parallel.spec import get_spec

Rows = Mapping[str, Sequence[tuple[str, int]]]


@dataclass(frozen=True)
class LoadReport:
    """What a load has done, by canonical name.

    Attributes:
        loaded: names in the module that were filled.
        missing: names in the module that the checkpoint lacks; they keep their values.
        unexpected: names in the checkpoint that the module lacks.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors were loaded"]
        for title, names in (("not in the checkpoint", self.missing), ("not in the module", self.unexpected)):
            if names:
                shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                lines.append(f"{len(names)} {title}: {shown}")
        return "; ".join(lines) + "."


class _Described(Checkpoint):
    """The face of a folder of ours over any contents: what is wanted is read by :meth:`fill`."""

    def __init__(self, path: Path, contents: Contents) -> None:
        self.folder = storage.LocalFolder(path)
        self._contents = contents
        self.manifest = Manifest(
            tensors={
                name: TensorRecord(e.dtype, e.shape, (StoredBox(str(path), name, boxes.whole(e.shape)),))
                for name, e in contents.tensors.items()
            },
            aliases=contents.aliases,
            scalars=contents.scalars,
        )

    def wants(self, record: TensorRecord, box: Box, into: Tensor) -> list[Want]:
        return [Want(record.boxes[0], record.dtype, box, into)] if box.numel else []

    def read_trainer(self) -> dict[str, Any]:
        return {"optimizers": self._contents.groups}

    def fill(self, wants: Sequence[Want], progress: Progress) -> None:
        """Copies what is wanted, a slice at a time."""
        count = Counter(progress, "read", sum(want.size for want in wants))
        with torch.no_grad():
            for want in wants:
                entry = self._contents.tensors[want.stored.key]
                for box in slices(want.box.shape, want.dtype.itemsize):
                    boxes.view(want.into, box).copy_(entry.read(box.moved(want.box.offset)))
                count(want.size)


def load_module(
    path: Path,
    contents: Contents,
    targets: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    *,
    strict: bool = True,
    progress: Progress = silent,
) -> LoadReport:
    """Copies weights and buffers into local tensors, in place. Collective.

    Args:
        path: for messages.
        contents: what is at ``path``.
        targets: local tensors by name, as ``module.state_dict()`` gives them.
        parameters: ``dict(module.named_parameters())`` of the same module.
        strict: whether a missing or unexpected name is an error; another shape always is.
        progress: called on every rank while it works.

    Raises:
        CheckpointError: on all ranks; the first differing names and shapes are listed, and nothing is changed.
    """
    ranks, what = Ranks(), f"load the weights of {path}"
    described = _Described(path, fused_as(contents, parameters))
    plans: list[restore.ModulePlan] = []

    def plan() -> None:
        tp = current_mesh().sizes["tp"]
        plans.append(restore.plan_module(described, into, parameters, tp, strict))

    with landing(targets) as into:
        ranks.together(what, plan)
        ranks.together(what, lambda: described.fill(plans[0].wants, progress))
    missing = tuple(plans[0].missing)
    loaded = dict.fromkeys(n for n in canonical_names(targets, parameters) if n not in missing)
    return LoadReport(tuple(loaded), missing, tuple(plans[0].unexpected))


def load_optimizers(
    path: Path,
    contents: Contents,
    optimizers: Sequence[Any],
    parameters: Mapping[str, nn.Parameter],
    *,
    progress: Progress = silent,
) -> None:
    """Gives optimizers their state and their groups' hyper-parameters. Collective.

    Raises:
        CheckpointError: on all ranks; no optimizer state, or of other optimizers.
    """
    ranks, what = Ranks(), f"load the optimizer state of {path}"
    described = _Described(path, fused_as(contents, parameters))
    wants: list[Want] = []
    copies: list[HostCopies] = []

    def plan() -> None:
        tp = current_mesh().sizes["tp"]
        wants.extend(restore.plan_optimizers(described, optimizers, parameters, tp, copies))

    ranks.together(what, plan)
    ranks.together(what, lambda: described.fill(wants, progress))
    for one in copies:
        one.put_back()


def lightning_contents(
    path: Path, document: Mapping[str, Any], optimizers: Sequence[Any], parameters: Mapping[str, nn.Parameter]
) -> Contents:
    """Describes a loaded Lightning file, whose optimizer state has numbers in the place of names.

    Raises:
        CheckpointError: the file's optimizers have other groups than those of the run.
    """
    groups = [[group["params"] for group in state.group_options(o, parameters)] for o in optimizers]

    def names(index: int, saved: Mapping[str, Any], _: Any) -> list[list[str]]:
        here = groups[index] if index < len(groups) else []
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        if sizes != [len(group) for group in here]:
            raise CheckpointError(
                f"optimizer {index} of {path} has groups of {sizes} parameters, the run's {[len(g) for g in here]}: resume "
                "with the optimizers of the run that wrote it, or load its weights only."
            )
        return here

    return lightning_file.describe(document, lambda name, entry, weights: [(name, 0)], names)


def fused_as(contents: Contents, parameters: Mapping[str, nn.Parameter]) -> Contents:
    """The same with tensors split where they are fused as the module's parameters are."""
    tp, rows = current_mesh().sizes["tp"], {}
    for name, param in parameters.items():
        parts = get_spec(param, tp).parts
        if any(part.name for part in parts):
            canonical = [place.name for place in boxes.placements(name, param, tp)]
            rows[name] = [(n, part.global_shape[0]) for n, part in zip(canonical, parts, strict=True)]
    return split_fused(contents, rows)


def split_fused(contents: Contents, rows: Rows) -> Contents:
    """Cuts tensors that are stored under a fused name into the canonical ones."""
    tensors: dict[str, Entry] = {}
    scalars: dict[str, dict[str, float]] = {}
    for key, entry in contents.tensors.items():
        prefix, name, suffix = split_key(key)
        members = rows.get(name, ())
        if not members or not entry.shape or entry.shape[0] != sum(count for _, count in members):
            tensors[key] = entry
            continue
        found = fusion.split({name: entry}, {name: members})
        tensors.update({f"{prefix}{canonical}{suffix}": part for canonical, part in found.items()})
    for owner, numbers in contents.scalars.items():
        prefix, name, _ = split_key(f"{owner}/")
        for canonical, _ in rows.get(name, ((name, 0),)):
            scalars[f"{prefix}{canonical}"] = numbers
    return dataclasses.replace(contents, tensors=tensors, scalars=scalars)


def canonical_names(targets: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """The canonical names of a module's tensors."""
    names, tp = Names(parameters), current_mesh().sizes["tp"]
    found = []
    for name, tensor in targets.items():
        param = names.parameter(name, tensor)
        found += [place.name for place in boxes.placements(name, tensor if param is None else param, tp)]
    return found
