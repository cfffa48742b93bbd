"""Lightning's own ``.ckpt`` files: one pickle with a state dict and optimizer states, whole tensors.

Names are those of a module that is not sharded, so that query, key and value may be fused; what was fused from what
stands under ``neuron_lightning`` in the files that are written here, together with master weights, which Lightning has
no place for. The files load with ``torch.load(weights_only=True)`` and are read that way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_lightning.checkpoint.formats import fusion, pickled, plain, staging
from neuron_lightning.checkpoint.formats.contents import Contents, Counter, Entry, Progress, silent
from neuron_lightning.checkpoint.formats.nxd_layout import NxdLayout, parts_of
from neuron_lightning.checkpoint.formats.nxd_order import names_by_group, parameters_in
from neuron_lightning.checkpoint.state import GROUP_CHOICES
from neuron_lightning.errors import CheckpointError

OURS = "neuron_lightning"
Rows = Callable[[str, Entry, Mapping[str, Entry]], Sequence[tuple[str, int]]]
Names = Callable[[int, Mapping[str, Any], Mapping[str, tuple[int, ...]]], list[list[str]]]


def load(path: Path, *, trusted: bool = False) -> dict[str, Any]:
    """The dictionary in the file; its tensors are mapped.

    Args:
        path: the file.
        trusted: let it run code, as whatever class it asks for does.

    Raises:
        CheckpointError: no such file, code in it, or no state dict.
    """
    document = pickled.load(path, trusted=trusted)
    if not isinstance(document, dict) or not isinstance(document.get("state_dict"), dict):
        raise CheckpointError(
            f"{path} is no Lightning checkpoint: it holds no dictionary with a 'state_dict'."
        )
    return document


def read(path: Path, rules: Mapping[str, str], no_decay: Sequence[str] | None = None) -> Contents:
    """Describes a file.

    Args:
        path: the file.
        rules: as :class:`NxdLayout` takes them: which parameters are fused, if the file does not say it itself.
        no_decay: words in names that exempt from weight decay, if the file does not name parameters.

    Raises:
        CheckpointError: as :func:`load`.
    """

    def rows(name: str, entry: Entry, weights: Mapping[str, Entry]) -> list[tuple[str, int]]:
        return _rows_by_rule(name, entry, weights, rules)

    def names(_: int, saved: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
        return _names_by_shape(saved, shapes, no_decay)

    return describe(load(path), rows, names)


def trainer_state(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a Trainer saves besides weights and optimizer state."""
    return {k: v for k, v in document.items() if k not in ("state_dict", "optimizer_states", OURS)}


def describe(document: Mapping[str, Any], rows: Rows, names: Names) -> Contents:
    """Describes what :func:`load` returned.

    Args:
        document: the dictionary.
        rows: for a parameter, its tensor and all weights the (canonical name, rows) in it; asked if the file does not
            say it.
        names: for an optimizer's number, its saved state and the parameters' shapes the names in each group; asked if
            the file does not say it.
    """
    state = {name: tensor for name, tensor in document["state_dict"].items() if isinstance(tensor, Tensor)}
    aliases = _tied(state)
    weights = {name: pickled.entry_of(tensor) for name, tensor in state.items() if name not in aliases}
    ours = document.get(OURS) or {}
    parts = ours["parts"] if "parts" in ours else {n: rows(n, e, weights) for n, e in weights.items()}
    contents = Contents(tensors={}, trainer=trainer_state(document))
    contents.aliases = {f"model/{a}": f"model/{b}" for a, b in aliases.items()}
    contents.tensors.update({f"model/{name}": entry for name, entry in fusion.split(weights, parts).items()})
    shapes = {name: entry.shape for name, entry in weights.items()}
    for index, saved in enumerate(document.get("optimizer_states") or []):
        known = "groups" in ours
        groups = [list(n) for n in ours["groups"][index]] if known else names(index, saved, shapes)
        masters = (ours.get("master_weights") or [{}] * (index + 1))[index]
        _add_optimizer(contents, index, saved, groups, parts, masters)
    return contents


def _tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    seen: dict[tuple[Any, ...], str] = {}
    found = {}
    for name, tensor in state.items():
        key = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
        )
        if tensor.numel() and key in seen:
            found[name] = seen[key]
        else:
            seen[key] = name
    return found


def _rows_by_rule(
    name: str, entry: Entry, weights: Mapping[str, Entry], rules: Mapping[str, str]
) -> list[tuple[str, int]]:
    beside = weights.get(f"{name.rpartition('qkv_proj.')[0]}o_proj.weight")
    parts = parts_of(NxdLayout(rules=rules), name, entry.shape, beside.shape[1] if beside else None)
    return [(part.name, part.size if part.dim == 0 else 0) for part in parts]


def _names_by_shape(
    saved: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], no_decay: Sequence[str] | None
) -> list[list[str]]:
    known = {
        n: tuple(v["exp_avg"].shape)
        for n, v in saved["state"].items()
        if isinstance(v.get("exp_avg"), Tensor)
    }
    numbers = [group["params"] for group in saved["param_groups"]]
    return names_by_group(parameters_in(shapes), numbers, known, no_decay)


def _add_optimizer(
    contents: Contents,
    index: int,
    saved: Mapping[str, Any],
    names: list[list[str]],
    parts: Mapping[str, Sequence[tuple[str, int]]],
    masters: Mapping[str, Tensor],
) -> None:
    groups = []
    for group, members in zip(saved["param_groups"], names, strict=True):
        kept = {k: v for k, v in group.items() if k != "params" and k not in GROUP_CHOICES}
        groups.append({"options": kept, "params": members})
        for name, number in zip(members, group["params"], strict=True):
            state = dict(saved["state"].get(number, {}))
            if name in masters:
                state["master"] = masters[name]
            _add_state(contents, index, parts.get(name, [(name, 0)]), state)
    contents.groups.append(groups)


def _add_state(
    contents: Contents, index: int, members: Sequence[tuple[str, int]], state: Mapping[str, Any]
) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim():
            split = fusion.split({"": pickled.entry_of(value)}, {"": members})
            contents.tensors.update({f"optimizer.{index}/{n}/{key}": e for n, e in split.items()})
        elif isinstance(value, (int, float, Tensor)):
            for name, _ in members:
                contents.scalars.setdefault(f"optimizer.{index}/{name}", {})[key] = float(value)


def write(
    target: Path,
    contents: Contents,
    *,
    fuse_qkv: bool = True,
    overwrite: bool = False,
    progress: Progress = silent,
) -> None:
    """Writes one file that Lightning and this package resume from.

    Tensors are put together in scratch files on disk, so that memory is needed for a slice, and disk space for the
    file once more.

    Args:
        target: the file.
        contents: what it will hold.
        fuse_qkv: whether query, key and value are one parameter, where the optimizer's groups do not tell.
        overwrite: whether a file of that name may be replaced.
        progress: told how far it is.

    Raises:
        CheckpointError: something is in the way, or the optimizer's groups do not fit the weights.
    """
    count = Counter(progress, "write", sum(entry.nbytes for entry in contents.tensors.values()))
    with (
        staging.staged(target, folder=False, overwrite=overwrite) as partial,
        pickled.scratch(target.parent) as scratch,
    ):

        def put(entry: Entry) -> Tensor:
            tensor = scratch.copy(entry)
            count(tensor.nbytes)
            return tensor

        pickled.save(_document(contents, put, fuse_qkv), partial)


def _document(contents: Contents, put: Any, fuse_qkv: bool) -> dict[str, Any]:
    weights = contents.weights()
    known = contents.parameter_names()
    fused = fusion.groups_of(weights, known, fuse_qkv)
    state = {name: put(fusion.joined([weights[m] for m in members])) for name, members in fused.items()}
    owner = {member: name for name, members in fused.items() for member in members}
    for alias, name in contents.weight_aliases().items():
        if owner.get(name) == name:
            state[alias] = state[name]
    states, masters = [], []
    for index, groups in enumerate(contents.groups):
        saved, kept = _optimizer(contents, index, groups, fused, put)
        states.append(saved)
        masters.append(kept)
    ours = {
        "parts": {
            n: [(m, weights[m].shape[0]) for m in members] for n, members in fused.items() if members != [n]
        },
        "groups": [[list(group["params"]) for group in groups] for groups in contents.groups],
        "master_weights": masters,
    }
    return {
        **plain.lightning_keys(contents.trainer),
        "state_dict": state,
        "optimizer_states": states,
        OURS: ours,
    }


def _optimizer(
    contents: Contents,
    index: int,
    groups: Sequence[Mapping[str, Any]],
    fused: Mapping[str, list[str]],
    put: Any,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    values: dict[int, dict[str, Any]] = {}
    masters: dict[str, Tensor] = {}
    written: list[dict[str, Any]] = []
    for group in groups:
        numbers: list[int] = []
        for name in group["params"]:
            if name not in fused:
                raise CheckpointError(
                    f"the optimizer's groups name {name}, which cannot be put together from the weights: convert the "
                    "weights only (--weights-only)."
                )
            number = sum(len(g["params"]) for g in written) + len(numbers)
            state = _state(contents, index, fused[name], put)
            if "master" in state:
                masters[name] = state.pop("master")
            if state:
                values[number] = state
            numbers.append(number)
        written.append({**plain.value(group["options"]), "params": numbers})
    return {"state": values, "param_groups": written}, masters


def _state(contents: Contents, index: int, members: Sequence[str], put: Any) -> dict[str, Any]:
    owners = [f"optimizer.{index}/{name}" for name in members]
    numbers = contents.scalars.get(owners[0], {})
    state: dict[str, Any] = {key: torch.tensor(number, device="cpu") for key, number in numbers.items()}
    for key in [
        k.removeprefix(f"{owners[0]}/") for k in contents.tensors if k.rpartition("/")[0] == owners[0]
    ]:
        state[key] = put(fusion.joined([contents.tensors[f"{owner}/{key}"] for owner in owners]))
    return state
