"""A folder that is either all there or not there: what one rank does around the writing of a checkpoint.

Everything is written into ``<target>.tmp`` beside the target (the same file system, so that the rename is atomic).
A target that exists is exchanged with the new folder in one system call where the file system can do that;
elsewhere it is renamed to ``<target>.old`` first, and :func:`locate` finds it there if a crash came in between.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import stat
import warnings
from pathlib import Path

from neuron_lightning.checkpoint import points
from neuron_lightning.checkpoint.refusals import with_remedy
from neuron_lightning.errors import CheckpointError

MANIFEST = "manifest.json"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_OUR_FILES = re.compile(r"(manifest|trainer|rank-\d+)[\w.]*\.(json|safetensors)$")
_GRAVE = ".removed"
_TEMPORARY = (".tmp", ".old", _GRAVE)


def temporary(target: Path) -> Path:
    """Where a checkpoint is while it is being written."""
    return target.with_name(target.name + ".tmp")


def replaced(target: Path) -> Path:
    """Where the checkpoint of this name is for a moment while another one takes its place."""
    return target.with_name(target.name + ".old")


def is_committed(path: Path) -> bool:
    """Whether ``path`` is a folder with a manifest."""
    return (path / MANIFEST).is_file()


def locate(path: Path) -> Path:
    """The folder of the committed checkpoint called ``path``.

    Raises:
        CheckpointError: there is none.
    """
    for candidate in (path, replaced(path)):
        if is_committed(candidate):
            return candidate
    if not path.exists():
        hint = " (an unfinished one is there: the save was interrupted)" if temporary(path).exists() else ""
        raise CheckpointError(f"there is no checkpoint at {path}{hint}: check the path.")
    kind = "a folder without a manifest.json" if path.is_dir() else "a file, not a folder"
    raise CheckpointError(f"{path} is not a checkpoint of this package: it is {kind}.")


def committed_in(parent: Path) -> list[Path]:
    """Names of the committed checkpoints directly in a folder, links left out.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        entries = [entry for entry in parent.iterdir() if entry.is_dir() and not entry.is_symlink()]
    except FileNotFoundError:
        return []
    except OSError as error:
        said = f"the folder {parent} cannot be read: {error.strerror}"
        raise CheckpointError(with_remedy(said, error)) from error
    names = {path for path in entries if path.suffix not in _TEMPORARY}
    names |= {path.with_suffix("") for path in entries if path.suffix == ".old"}
    return sorted(path for path in names if is_committed(path) or is_committed(replaced(path)))


def prepare(target: Path) -> Path:
    """Makes the empty temporary folder; what an interrupted save left there is removed.

    Raises:
        CheckpointError: something that is no checkpoint stands in the way.
        OSError: no permission, no space.
    """
    if target.exists() and not is_committed(target) and not _is_empty_folder(target):
        raise CheckpointError(
            f"{target} exists and is not a checkpoint: choose another name or remove it; it is left as it is."
        )
    if is_committed(replaced(target)):
        if os.path.lexists(target):
            _delete(replaced(target))
        else:
            os.rename(replaced(target), target)
    folder = temporary(target)
    _delete(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_graves(target.parent)
    folder.mkdir()
    points.reach("prepared")
    return folder


def publish(target: Path) -> None:
    """Gives the temporary folder its name; afterwards the checkpoint exists, whatever happens to the machine."""
    folder = temporary(target)
    sync_folder(folder)
    if target.is_symlink():
        target.unlink()
    points.reach("before_rename")
    if not target.exists() or _is_empty_folder(target):
        os.rename(folder, target)
        leftover = None
    elif _exchange(folder, target):
        leftover = folder
    else:
        leftover = replaced(target)
        _delete(leftover)
        os.rename(target, leftover)
        points.reach("renamed_aside")
        os.rename(folder, target)
    points.reach("after_rename")
    sync_folder(target.parent)
    points.reach("parent_synced")
    if leftover is not None:
        try:
            _delete(leftover)
        except OSError as error:  # the new one is committed: that is no failure of the save
            warnings.warn(
                f"{target} is saved, but the one that it replaced cannot be deleted from {leftover} ({error}); the next "
                "save of that name tries again.",
                stacklevel=2,
            )
        points.reach("old_removed")


def discard(target: Path) -> None:
    """Removes the temporary folder of a save that failed."""
    shutil.rmtree(temporary(target), ignore_errors=True)


def remove(target: Path) -> None:
    """Deletes a checkpoint: first it loses its name, then its files. A link to one loses only the link.

    Raises:
        CheckpointError: ``target`` is a folder, but no checkpoint.
    """
    if target.is_symlink() or target.is_file():
        target.unlink()
        return
    if not target.exists():
        return
    if not is_committed(target):
        raise CheckpointError(f"{target} is not a checkpoint (it has no {MANIFEST}): it is left as it is.")
    grave = target.with_name(target.name + _GRAVE)
    _delete(grave)
    _delete(replaced(target))
    os.rename(target, grave)
    points.reach("remove_renamed")
    sync_folder(target.parent)
    _delete(grave)


def clear_unfinished(parent: Path) -> None:
    """Deletes what killed saves and removals left in a folder; only the one job that saves there may call it.

    Raises:
        OSError: no permission.
    """
    for path in parent.iterdir():
        if path.suffix in (".tmp", _GRAVE) and path.is_dir() and not path.is_symlink() and _is_ours(path):
            _delete(path)


def require_regular(path: Path) -> int:
    """The size of a file that must be a regular one.

    Raises:
        CheckpointError: missing, a link, or something else than a file.
    """
    try:
        status = os.lstat(path)
    except OSError as error:
        said = f"{path} cannot be read ({error.strerror}): the checkpoint is incomplete"
        raise CheckpointError(with_remedy(said, error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file: links and devices in a checkpoint are refused.")
    return status.st_size


def sync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _is_ours(folder: Path) -> bool:
    """Whether all that it holds has names of a checkpoint's files."""
    return all(_OUR_FILES.match(path.name) for path in folder.iterdir())


def _clear_graves(parent: Path) -> None:
    """Finishes removals that a crash cut short; they have lost their names, so nobody reads them."""
    for path in parent.iterdir():
        if path.suffix == _GRAVE and path.is_dir() and not path.is_symlink():
            _delete(path)


def _delete(path: Path) -> None:
    """Deletes a file, a link or a folder: its manifest first, so that a half-deleted one is no checkpoint."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names atomically (Linux ``renameat2``); False where the system cannot do it."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    result = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    return bool(result == 0)
