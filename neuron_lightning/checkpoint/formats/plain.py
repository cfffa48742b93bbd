"""Trainer state as values that torch's weights-only unpickler accepts, and the keys that Lightning needs."""

from __future__ import annotations

import datetime
from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum
from importlib import metadata
from pathlib import PurePath
from typing import Any

import numpy
import torch
from torch import Tensor

from neuron_lightning.checkpoint.typed_json import Named

_AS_THEY_ARE = (type(None), bool, int, float, str, bytes, torch.dtype, torch.Size, torch.device)


def value(given: Any) -> Any:
    """``given`` with paths, times, classes and the like as text or numbers, and numpy as tensors or numbers."""
    if isinstance(given, Tensor):
        return given
    if isinstance(given, Enum):
        return value(given.value)
    if type(given) in _AS_THEY_ARE:
        return given
    if isinstance(given, Mapping):
        pairs = [(value(key), value(item)) for key, item in given.items()]
        return OrderedDict(pairs) if isinstance(given, OrderedDict) else dict(pairs)
    if isinstance(given, (list, tuple, set)):
        return (
            type(given)(value(item) for item in given) if type(given) in (list, tuple, set) else list(given)
        )
    if isinstance(given, frozenset):
        return {value(item) for item in given}
    if isinstance(given, numpy.ndarray):
        return torch.from_numpy(given.copy())
    if isinstance(given, numpy.generic):
        return given.item()
    if isinstance(given, datetime.timedelta):
        return given.total_seconds()
    if isinstance(given, Named):
        return given.qualified_name
    if isinstance(given, (PurePath, datetime.date)):
        return str(given)
    return repr(given)


def lightning_keys(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer state with the keys that every Lightning checkpoint has."""
    try:
        version = metadata.version("lightning")
    except metadata.PackageNotFoundError:
        version = "2.6.0"
    known: dict[str, Any] = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": version,
        "lr_schedulers": [],
    }
    kept = {
        k: v for k, v in trainer.items() if k not in ("optimizer_states", "layout") and not _is_marker(k, v)
    }
    if callbacks := kept.get("callbacks"):
        kept["callbacks"] = {name: _without_markers(state) for name, state in callbacks.items()}
    return {**known, **value(kept)}


def _is_marker(key: str, found: Any) -> bool:
    """Whether a value stands for a set of averaged weights that a folder of ours holds beside the module's."""
    return key in ("current_model_state", "average_model_state") and isinstance(found, str)


def _without_markers(state: Any) -> Any:
    if not isinstance(state, Mapping):
        return state
    return {key: found for key, found in state.items() if not _is_marker(key, found)}
