"""Which committed checkpoints a folder holds."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from neuron_lightning.checkpoint import commit, manifest, storage
from neuron_lightning.checkpoint.storage import Folder
from neuron_lightning.errors import CheckpointError

_LOOK_INTO = 64 << 20
_STEP = re.compile(rb'"step":(\d+)')
_STEP_IN_NAME = re.compile(r"step=(\d+)")


@dataclass(frozen=True)
class CheckpointInfo:
    """One committed checkpoint.

    Attributes:
        step: optimizer steps made; None where it was saved without, or where nothing tells.
        path: its name, as the functions of this package take it.
        epoch: epoch, or None.
        damage: why its manifest cannot be read, or None. It was committed once, so it is listed: whoever resumes can
            say that it was passed over. Its files are not looked at; that is :func:`verify_checkpoint`.
    """

    step: int | None
    path: str
    epoch: int | None
    damage: str | None = None


def list_checkpoints(parent: str | Path) -> list[CheckpointInfo]:
    """The committed checkpoints directly in ``parent``, ascending by step. Not collective.

    What is being written, what an interrupted save left and links are not listed. A damaged manifest counts with the
    step that can still be read from it or from the name, and as the newest where there is none.

    Raises:
        CheckpointError: ``parent`` cannot be read; one that does not exist holds no checkpoint.
    """
    found = []
    for path in storage.committed_in(parent):
        folder = storage.place(path).open()
        try:
            step, epoch = manifest.read_position(folder)
            found.append(CheckpointInfo(step, path, epoch))
        except CheckpointError as error:
            found.append(CheckpointInfo(_guess_step(folder), path, None, str(error)))
    return sorted(found, key=_age)


def _age(info: CheckpointInfo) -> tuple[bool, int, str]:
    unknown = info.damage is not None and info.step is None
    return unknown, -1 if info.step is None else info.step, info.path


def _guess_step(folder: Folder) -> int | None:
    raw = b""
    with contextlib.suppress(CheckpointError), folder.open(commit.MANIFEST) as reader:
        raw = reader.read(0, min(reader.size, _LOOK_INTO))
    inside, named = _STEP.search(raw), _STEP_IN_NAME.search(folder.name)
    return int(inside[1]) if inside else int(named[1]) if named else None
