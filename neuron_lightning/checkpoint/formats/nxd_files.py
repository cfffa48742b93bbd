"""Which files an NxD checkpoint consists of, and what each of them holds; nothing is read before it is asked for.

Two folders are known: that of NxD Lightning, ``tp_rank_XX_pp_rank_XX[_dp_rank_XX]`` (with xser a file of references
and beside it ``….tensors/tensor_<n>.pt``; without it a folder with ``checkpoint.pt``), each with the whole dictionary
of a Lightning checkpoint; and that of ``neuronx_distributed.save_checkpoint``, ``<tag>/model`` and ``<tag>/optim`` with
``dp_rank_XX_tp_rank_XX_pp_rank_XX.pt``, ``scheduler.pt``, ``user_content.pt`` and the markers ``checkpoint``, ``done``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_lightning.checkpoint import commit
from neuron_lightning.checkpoint.boxes import Box, view
from neuron_lightning.checkpoint.formats import pickled
from neuron_lightning.checkpoint.formats.contents import Entry
from neuron_lightning.errors import CheckpointError

LIGHTNING = re.compile(r"tp_rank_(?P<tp>\d+)_pp_rank_(?P<pp>\d+)(?:_dp_rank_(?P<dp>\d+))?")
CORE = re.compile(r"dp_rank_(?P<dp>\d+)(?P<ep>_ep_rank_\d+)?_tp_rank_(?P<tp>\d+)_pp_rank_(?P<pp>\d+)\.pt")
_PLAIN = "checkpoint.pt"

Place = tuple[int, int, int]
"""(tensor, pipeline, data) parallel rank."""


@dataclass(frozen=True)
class Sizes:
    """Ranks by axis."""

    tp: int
    pp: int
    dp: int


class NxdFiles:
    """An NxD checkpoint.

    Args:
        folder: NxD Lightning's folder, a tag's folder, or the folder of a single tag.

    Attributes:
        is_core: whether ``save_checkpoint`` wrote it, and not Lightning.
        sizes: of the layout that wrote it; ``dp`` counts the shards of optimizer state.

    Raises:
        CheckpointError: no such checkpoint, or files are missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = _tag_folder(folder)
        self.is_core = (self.folder / "model").is_dir()
        if self.is_core:
            self._models = _find(self.folder / "model", CORE)
            optim = self.folder / "optim"
            self._optims = _find(optim, CORE) if optim.is_dir() else {}
        else:
            self._models = self._optims = _find(self.folder, LIGHTNING)
        if not self._models:
            raise CheckpointError(
                f"{folder} holds no files of NxD's layout (tp_rank_XX_pp_rank_XX…, or model/dp_rank_XX_tp_rank_XX_pp_rank_XX.pt)."
            )
        self.sizes = _sizes(self.folder, self._models, self._optims)
        self._loaded: dict[Path, Any] = {}

    def model(self, tp: int, pp: int) -> dict[str, Any]:
        """Raw state dict of a rank: tensors (mapped) or references."""
        document = self._document(self._models[tp, pp, 0])
        if not self.is_core:
            return _mapping(document, "state_dict", self._models[tp, pp, 0])
        inner = document.get("model")
        return inner if isinstance(inner, dict) else document

    def optimizers(self, tp: int, pp: int, dp: int) -> list[dict[str, Any]]:
        """Raw optimizer state dicts of a rank."""
        if not self._optims:
            return []
        document = self._document(self._optims[tp, pp, dp])
        return [document] if self.is_core else list(document.get("optimizer_states", []))

    def trainer(self) -> dict[str, Any]:
        """What is saved besides weights and optimizer state, by rank 0."""
        if not self.is_core:
            document = self._document(self._models[0, 0, 0])
            return {k: v for k, v in document.items() if k not in ("state_dict", "optimizer_states")}
        found: dict[str, Any] = {}
        for name, key in (("user_content.pt", "user_content"), ("scheduler.pt", "lr_schedulers")):
            if (path := self.folder / name).is_file():
                value = pickled.load(path)
                found[key] = [value] if key == "lr_schedulers" else value
        content = found.get("user_content")
        if isinstance(content, dict):
            found.update({k: v for k, v in content.items() if k in ("epoch", "global_step")})
        return found

    def entry(self, value: Any, tp: int, pp: int, dp: int | None = None) -> Entry | None:
        """A tensor of a raw state dict as an entry; None for anything else.

        Args:
            value: found in :meth:`model` (``dp`` None) or :meth:`optimizers` of that rank.
        """
        if isinstance(value, Tensor):
            return pickled.entry_of(value)
        if not isinstance(value, pickled.TensorReference):
            return None
        path = self._models[tp, pp, 0] if dp is None else self._optims[tp, pp, dp]
        return self._referenced(path, value)

    def _referenced(self, path: Path, reference: pickled.TensorReference) -> Entry:
        if type(reference.tid) is not int or reference.tid < 0:
            raise CheckpointError(
                f"{path} refers to the tensor {str(reference.tid)[:100]!r}: not a number; refused."
            )
        target = path.with_name(path.name + ".tensors") / f"tensor_{reference.tid}.pt"
        info_path = path.with_name(path.name + ".info.pt")
        info = self._document(info_path).get(reference.tid) if info_path.is_file() else None
        if info is None:
            tensor = _tensor(target)
            return Entry(tensor.dtype, tuple(tensor.shape), _reader(target))
        return Entry(info["dtype"], tuple(info["shape"]), _reader(target))

    def is_stored(self, value: Any, tp: int, pp: int) -> bool:
        """Whether a weight is in its file: NxD can leave those out that master weights replace."""
        if not isinstance(value, pickled.TensorReference):
            return True
        path = self._models[tp, pp, 0]
        return (path.with_name(path.name + ".tensors") / f"tensor_{value.tid}.pt").is_file()

    def _document(self, path: Path) -> dict[Any, Any]:
        path = path / _PLAIN if path.is_dir() else path
        if path not in self._loaded:
            loaded = pickled.load(path)
            if not isinstance(loaded, dict):
                raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a dictionary.")
            self._loaded[path] = loaded
        document: dict[Any, Any] = self._loaded[path]
        return document


def is_nxd(folder: Path) -> bool:
    """Whether a folder looks like an NxD checkpoint."""
    if not folder.is_dir():
        return False
    names = [entry.name for entry in folder.iterdir()]
    if any(LIGHTNING.fullmatch(name) for name in names) or (folder / "model").is_dir():
        return True
    return any((folder / name / "model").is_dir() for name in names)


def _tag_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: pass NxD's checkpoint folder.")
    tags = []
    if not (folder / "model").is_dir() and not any(LIGHTNING.fullmatch(e.name) for e in folder.iterdir()):
        tags = sorted(e.name for e in folder.iterdir() if (e / "model").is_dir())
        if len(tags) > 1:
            raise CheckpointError(
                f"{folder} holds several tags: pass one of them, such as {folder / tags[-1]}."
            )
    found = folder / tags[0] if tags else folder
    if (found / "checkpoint").is_file() and not (found / "done").is_file():
        raise CheckpointError(f"{found} has no 'done' marker: its save was interrupted; use another one.")
    return found


def _find(folder: Path, pattern: re.Pattern[str]) -> dict[Place, Path]:
    found: dict[Place, Path] = {}
    for entry in sorted(folder.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match is None:
            continue
        ranks = match.groupdict()
        if ranks.get("ep"):
            raise CheckpointError(f"{entry} belongs to expert parallelism, which this release does not read.")
        found[int(ranks["tp"]), int(ranks["pp"]), int(ranks["dp"] or 0)] = entry
    return found


def _sizes(folder: Path, models: Mapping[Place, Path], optims: Mapping[Place, Path]) -> Sizes:
    places = [*models, *optims]
    tp, pp, dp = (1 + max(place[axis] for place in places) for axis in range(3))
    for t in range(tp):
        for p in range(pp):
            missing = [(t, p, 0)] if (t, p, 0) not in models else []
            missing += [(t, p, d) for d in range(dp) if optims and (t, p, d) not in optims]
            if missing:
                raise CheckpointError(
                    f"{folder} holds no file of (tensor, pipeline, data) parallel rank {missing[0]}, although it goes up "
                    f"to {(tp - 1, pp - 1, dp - 1)}: it is incomplete."
                )
    return Sizes(tp, pp, dp)


def _mapping(document: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    inner = document.get(key)
    if not isinstance(inner, dict):
        raise CheckpointError(f"{path} has no {key!r}: it is not what NxD Lightning writes.")
    return inner


def _tensor(path: Path) -> Tensor:
    commit.require_regular(path)
    tensor = pickled.load(path)
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{path} holds a {type(tensor).__name__}, not a tensor.")
    return tensor


def _reader(path: Path) -> Callable[[Box], Tensor]:
    return lambda box: view(_tensor(path), box)


def torch_sizes(shape: Any) -> tuple[int, ...]:
    """A shape as plain numbers."""
    return tuple(int(n) for n in (shape if isinstance(shape, (torch.Size, list, tuple)) else ()))
