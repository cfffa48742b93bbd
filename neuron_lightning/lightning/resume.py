"""Which checkpoint a run goes on from: ``auto_resume``, ``ckpt_path="last"`` and ``"best"``.

Ranks decide together, after the process group exists: rank 0 lists the folders of the checkpoint callbacks, and all
verify what is chosen. Order is by step as the manifests say it, never by modification time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from neuron_lightning.checkpoint import (
    CheckpointInfo,
    exchange,
    list_checkpoints,
    read_trainer_state,
    verify_checkpoint,
)
from neuron_lightning.errors import CheckpointError, ConfigError

_VERSION = re.compile(r"-v(\d+)$")


def check_folders(trainer: Trainer) -> None:
    """Checks, before folders get their default names, that there is one to look in again next time.

    Raises:
        ConfigError: no checkpoint callback has a ``dirpath``.
    """
    if not any(callback.dirpath for callback in _callbacks(trainer)):
        raise ConfigError(
            "auto_resume=True goes on from the newest checkpoint in the folder of a checkpoint callback, but none has "
            "a dirpath (the default folder is another one in every run): add NeuronModelCheckpoint(dirpath=…) to the "
            "Trainer's callbacks."
        )


def folders(trainer: Trainer) -> list[str]:
    """Folders of the checkpoint callbacks, each once."""
    return list(dict.fromkeys(str(callback.dirpath) for callback in _callbacks(trainer) if callback.dirpath))


def newest_intact(trainer: Trainer) -> str | None:
    """The newest whole checkpoint of which every file matches its hash; None where there is none. Collective.

    What is damaged is passed over with one warning that names the first damaged file.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged, or a folder cannot be read.
    """
    candidates = _candidates(trainer)
    problems: list[str] = []
    for info in reversed(candidates):
        problem = _problem(info)
        if problem is None:
            _report(info, problems)
            return info.path
        problems.append(problem)
    if problems:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoint(s) in {', '.join(folders(trainer))} can be resumed from: "
            f"{problems[0]} To start over, choose another folder or move them away."
        )
    rank_zero_info(f"auto_resume: no checkpoint in {', '.join(folders(trainer))} yet; starting from step 0.")
    return None


def last(trainer: Trainer) -> str | None:
    """The checkpoint of the highest step, or None. Collective."""
    candidates = _candidates(trainer)
    if not candidates:
        rank_zero_warn(
            f'ckpt_path="last": there is no checkpoint in {", ".join(folders(trainer)) or "any folder"} yet; starting '
            "without one."
        )
        return None
    return candidates[-1].path


def best(trainer: Trainer) -> str:
    """The best checkpoint, as the newest one in the folder knows it. Collective.

    Raises:
        ConfigError: there is none that monitors something.
    """
    found: list[str | None] = []

    def look() -> str | None:
        return _recorded_best(trainer) if exchange.world()[0] == 0 else None

    found = exchange.together('find ckpt_path="best"', look)
    if not found[0]:
        raise ConfigError(
            f'ckpt_path="best": no checkpoint in {", ".join(folders(trainer)) or "any folder"} says which is the best; '
            "give a checkpoint callback with monitor= and the dirpath of the run, or the checkpoint's path."
        )
    return found[0]


def _callbacks(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _candidates(trainer: Trainer) -> list[CheckpointInfo]:
    """Committed checkpoints of all folders, oldest first; the same list on every rank."""
    places = folders(trainer)

    def look() -> list[CheckpointInfo]:
        if exchange.world()[0] != 0:
            return []
        return sorted((info for place in places for info in list_checkpoints(place)), key=_age)

    return exchange.together(f"list the checkpoints in {', '.join(places)}", look)[0]


def _age(info: CheckpointInfo) -> tuple[bool, int, int]:
    """By step; of the same step the one with the higher version in its name is the younger."""
    version = _VERSION.search(Path(info.path).stem)
    unknown = info.step is None
    return unknown and info.damage is not None, info.step or 0, int(version[1]) if version else 0


def _problem(info: CheckpointInfo) -> str | None:
    """Why a run cannot go on from a checkpoint, or None. Collective."""
    if info.damage is not None:
        return info.damage
    try:
        verify_checkpoint(info.path)
    except CheckpointError as error:
        return str(error)
    whole = exchange.together(f"read {info.path}", lambda: _has_trainer_state(info.path))[0]
    return None if whole else f"{info.path} holds weights only."


def _has_trainer_state(path: str) -> bool:
    return exchange.world()[0] != 0 or "optimizer_states" in read_trainer_state(path)


def _report(info: CheckpointInfo, problems: Sequence[str]) -> None:
    if problems:
        rank_zero_warn(f"auto_resume goes on from {info.path} (step {info.step}), because {problems[0]}")
    else:
        rank_zero_info(f"auto_resume: going on from {info.path} (step {info.step}).")


def _recorded_best(trainer: Trainer) -> str | None:
    for callback in _callbacks(trainer):
        if callback.best_model_path:
            return str(callback.best_model_path)
        infos = [info for info in list_checkpoints(str(callback.dirpath)) if info.damage is None]
        for info in sorted(infos, key=_age, reverse=True):
            state: dict[str, Any] = (
                read_trainer_state(info.path).get("callbacks", {}).get(callback.state_key, {})
            )
            if path := state.get("best_model_path"):
                return os.path.join(str(callback.dirpath), os.path.basename(path))
    return None
