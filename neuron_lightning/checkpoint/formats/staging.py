"""Files and folders that appear under their name when they are complete, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neuron_lightning.checkpoint import commit
from neuron_lightning.errors import CheckpointError


def check_free(target: Path, overwrite: bool) -> None:
    """Raises :class:`CheckpointError` if something is there that must not be replaced."""
    empty_folder = target.is_dir() and not any(target.iterdir())
    if os.path.lexists(target) and not overwrite and not empty_folder:
        raise CheckpointError(
            f"{target} exists: choose another name, remove it, or allow it to be replaced (--overwrite)."
        )


@contextmanager
def staged(target: Path, *, folder: bool, overwrite: bool = False) -> Iterator[Path]:
    """Yields ``<target>.partial`` to write to, and renames it to ``target`` if the body succeeds.

    Args:
        target: what is to appear.
        folder: whether it is a folder, which is made here.
        overwrite: whether what is there may be replaced.

    Raises:
        CheckpointError: something is there and must not be replaced.
    """
    check_free(target, overwrite)
    partial = target.with_name(target.name + ".partial")
    _delete(partial)
    target.parent.mkdir(parents=True, exist_ok=True)
    if folder:
        partial.mkdir()
    complete = False
    try:
        yield partial
        complete = True
    finally:
        if not complete:
            _delete(partial)
    for inner in [p for p in partial.rglob("*") if p.is_dir()] + [partial] * folder:
        commit.sync_folder(inner)
    if os.path.lexists(target) and not (target.is_file() and not folder):
        _delete(target)
    os.replace(partial, target)
    commit.sync_folder(target.parent)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
