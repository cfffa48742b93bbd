"""Weights for other programs: a Hugging Face folder, and one merged safetensors file.

Both hold weights only. Names are taken as they come: the caller renames. Neither needs ``transformers``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuron_lightning.checkpoint import commit, output
from neuron_lightning.checkpoint.formats import staging, stream
from neuron_lightning.checkpoint.formats.contents import Contents, Counter, Entry, Progress, by_size, silent
from neuron_lightning.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
MAX_FILE_BYTES = 5 * 10**9
_FILE_NAME = re.compile(r"[\w.-]+", re.ASCII)


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a ``config.json``, or in the one of a folder.

    Raises:
        CheckpointError: missing, or no JSON object.
    """
    path = path / CONFIG if path.is_dir() else path
    values = _json(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not a JSON object.")
    return values


def read_folder(folder: Path) -> Contents:
    """Describes a Hugging Face folder.

    Raises:
        CheckpointError: no safetensors files, or damaged ones.
    """
    if (folder / INDEX).is_file():
        index = _json(folder / INDEX)
        files = _indexed(folder, index)
    elif (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    else:
        seen = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        raise CheckpointError(
            f"{folder} holds neither {SINGLE} nor {INDEX} (found: {seen}): weights are read from safetensors files "
            "only; convert others with transformers' save_pretrained()."
        )
    contents = Contents(tensors={})
    for path in files:
        _add(contents, path)
    contents.config = read_config(folder) if (folder / CONFIG).is_file() else None
    return contents


def _indexed(folder: Path, index: Any) -> list[Path]:
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{folder / INDEX} has no weight_map: it is damaged.")
    files = sorted({str(name) for name in names.values()})
    if bad := [name for name in files if not _FILE_NAME.fullmatch(name) or name in (".", "..")]:
        raise CheckpointError(
            f"{folder / INDEX} names the file {bad[0]!r}, which is not in its folder: refused."
        )
    return [folder / name for name in files]


def read_file(path: Path) -> Contents:
    """Describes one safetensors file. Raises :class:`CheckpointError`."""
    contents = Contents(tensors={})
    _add(contents, path)
    return contents


def _add(contents: Contents, path: Path) -> None:
    entries, metadata = stream.read_entries(path)
    if twice := [name for name in entries if f"model/{name}" in contents.tensors]:
        raise CheckpointError(f"{path} holds {twice[0]}, which another file of the folder holds too.")
    contents.tensors.update({f"model/{name}": entry for name, entry in entries.items()})
    tied = {a: b for a, b in metadata.items() if b in entries and a not in entries}
    contents.aliases.update({f"model/{a}": f"model/{b}" for a, b in tied.items()})


def write_folder(
    target: Path,
    contents: Contents,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    overwrite: bool = False,
    progress: Progress = silent,
) -> None:
    """Writes a folder that ``transformers`` loads, with ``config.json`` if ``contents`` know it.

    Tied weights are written once, and the config says that they are tied.

    Raises:
        CheckpointError: something is in the way, or a dtype that safetensors lacks.
    """
    weights = contents.weights()
    groups = by_size(list(weights.items()), max_file_bytes)
    names = _file_names(len(groups))
    count = Counter(progress, "write", _total(weights))
    with staging.staged(target, folder=True, overwrite=overwrite) as folder:
        for name, members in zip(names, groups, strict=True):
            stream.write_entries(output.LocalSink(folder / name), members, on_bytes=count)
        if len(names) > 1:
            where = {key: name for name, members in zip(names, groups, strict=True) for key, _ in members}
            index = {"metadata": {"total_size": _total(weights)}, "weight_map": where}
            _write_json(folder / INDEX, index)
        if contents.config is not None:
            _write_json(folder / CONFIG, _exported_config(contents, weights))


def _exported_config(contents: Contents, weights: Mapping[str, Entry]) -> dict[str, Any]:
    floating = [entry.dtype for entry in weights.values() if entry.dtype.is_floating_point]
    values = dict(contents.config or {})
    if floating:
        values["torch_dtype"] = str(max(set(floating), key=floating.count)).removeprefix("torch.")
        values.pop("dtype", None)
    if "lm_head.weight" in contents.weight_aliases():
        values["tie_word_embeddings"] = True
    return values


def write_file(
    target: Path, contents: Contents, *, overwrite: bool = False, progress: Progress = silent
) -> None:
    """Writes all weights into one safetensors file.

    A tied name stands in the metadata beside the name under which it is stored, as ``safetensors.torch`` does.

    Raises:
        CheckpointError: something is in the way, or a dtype that safetensors lacks.
    """
    weights = contents.weights()
    count = Counter(progress, "write", _total(weights))
    with staging.staged(target, folder=False, overwrite=overwrite) as partial:
        stream.write_entries(
            output.LocalSink(partial),
            list(weights.items()),
            metadata=contents.weight_aliases(),
            on_bytes=count,
        )


def _file_names(number: int) -> list[str]:
    if number == 1:
        return [SINGLE]
    return [f"model-{i:05}-of-{number:05}.safetensors" for i in range(1, number + 1)]


def _total(weights: Mapping[str, Entry]) -> int:
    return sum(entry.nbytes for entry in weights.values())


def _json(path: Path) -> Any:
    try:
        commit.require_regular(path.resolve())
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error


def _write_json(path: Path, value: Any) -> None:
    output.write_bytes(output.LocalSink(path), [(json.dumps(value, indent=2) + "\n").encode()])
