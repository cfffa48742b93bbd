"""Reading a Hugging Face folder: only this rank's slices of its tensors are read."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from neuron_lightning.checkpoint.boxes import view
from neuron_lightning.errors import CheckpointError
from neuron_lightning.models.hf_folder import INDEX, SINGLE, Entry, NameMap, entries_of
from neuron_lightning.parallel.initialize import mark_drawn


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in ``config.json``.

    Raises:
        CheckpointError: missing, or no JSON object.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not an object.")
    return values


def read_folder(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name_map: NameMap,
    ignore: Collection[str] = (),
    device: torch.device | str = "cpu",
) -> None:
    """Fills ``model`` from ``folder``, which every rank must see. Nothing is exchanged.

    Parameters on ``meta`` become real. All of them count as drawn: ``materialize`` leaves them alone. An
    optimizer with master weights that exists already must be told (``reload_master_weights()``).

    Args:
        model: its parameters carry their shard specs.
        folder: safetensors files.
        name_map: canonical global name to the name in the folder.
        ignore: names that the folder may hold beyond the model's.
        device: where parameters that are on ``meta`` go.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape; a file is missing or damaged.
            The model is untouched then.
    """
    files = _find_files(Path(folder))
    entries = entries_of(model, name_map)
    readers = _open(files)
    where = {key: reader for reader in readers for key in reader.keys()}  # noqa: SIM118 - not a mapping
    _check(Path(folder), entries, where, ignore)
    real = _make_real(model, torch.device(device))
    for entry in entries:
        param = real[id(entry.param)]
        stored, box = where[entry.key].get_slice(entry.key), entry.placement.box
        if box.numel:
            index = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
            view(param.detach(), entry.placement.local).copy_(stored[index])
        mark_drawn(param)
    _zero_padding(entries, real)


def _find_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    seen = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
    raise CheckpointError(
        f"{folder} holds neither {SINGLE} nor {INDEX} (found: {seen}): weights are read from safetensors files "
        "only; convert others with transformers' save_pretrained()."
    )


def _open(files: list[Path]) -> list[Any]:
    try:
        return [safe_open(path, framework="pt", device="cpu") for path in files]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"a weight file cannot be opened: {error}") from error


def _check(folder: Path, entries: list[Entry], where: dict[str, Any], ignore: Collection[str]) -> None:
    wanted = {entry.key: tuple(entry.placement.global_shape) for entry in entries}
    problems = {
        "missing": sorted(wanted.keys() - where.keys()),
        "unexpected": sorted(where.keys() - wanted.keys() - set(ignore)),
        "of another shape": [
            f"{key} {found} instead of {shape}"
            for key, shape in sorted(wanted.items())
            if key in where and (found := tuple(where[key].get_slice(key).get_shape())) != shape
        ],
    }
    texts = [f"{len(v)} {kind}: {', '.join(v[:8])}" for kind, v in problems.items() if v]
    if texts:
        raise CheckpointError(
            f"the weights in {folder} are not this model's. {'; '.join(texts)}. Compare its config.json with the "
            "model's config (tie_word_embeddings, attention_bias, sizes)."
        )


def _make_real(model: nn.Module, device: torch.device) -> dict[int, nn.Parameter]:
    """Replaces parameters on ``meta``; all parameters by the identity of what stood there before."""
    real: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, param in module._parameters.items():
            if param is None:
                continue
            if id(param) not in real:
                real[id(param)] = _allocate(param, device) if param.is_meta else param
            module._parameters[leaf] = real[id(param)]
    return real


def _allocate(param: nn.Parameter, device: torch.device) -> nn.Parameter:
    new = nn.Parameter(torch.empty_like(param, device=device), requires_grad=param.requires_grad)
    new.__dict__.update(param.__dict__)
    return new


def _zero_padding(entries: list[Entry], real: dict[int, nn.Parameter]) -> None:
    for entry in entries:
        rows = real[id(entry.param)].detach()[entry.rows]
        held = entry.placement.local.shape[0]
        rows[held:].zero_()
