"""One training run a folder: the lock that a running job holds on the folders that it saves to."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from functools import partial
from pathlib import Path

from neuron_lightning.checkpoint import commit, exchange
from neuron_lightning.errors import CheckpointError

_log = logging.getLogger(__name__)

LOCK_FILE = ".neuron_lightning.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_PATIENCE_S = 2.0
"""How long a job that has just been ended may take to let go."""


class FolderLocks:
    """Advisory POSIX locks of rank 0, which the system releases when its process ends, however it ends.

    Not ``flock``: that would be held on by the workers of a data loader, which outlive a killed rank for seconds.
    """

    def __init__(self) -> None:
        self._held: dict[str, int] = {}

    def acquire(self, folders: list[str]) -> None:
        """Takes the locks of local folders, makes the folders, and clears up after a killed job. Collective.

        Raises:
            CheckpointError: on all ranks; another job trains into a folder (who is named), or it cannot be written.
        """
        for folder in folders:
            if "://" not in folder and folder not in self._held:
                exchange.together(f"use the checkpoint folder {folder}", partial(self._take, folder))

    def release(self) -> None:
        """Lets go of all, and removes the lock files."""
        held, self._held = self._held, {}
        for folder, handle in held.items():
            Path(folder, LOCK_FILE).unlink(missing_ok=True)
            os.close(handle)

    def _take(self, folder: str) -> None:
        if exchange.world()[0] != 0:
            return
        os.makedirs(folder, exist_ok=True)
        deadline = time.monotonic() + _PATIENCE_S
        while (handle := _locked(Path(folder, LOCK_FILE))) is None:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{folder} is in use by another job ({_owner(Path(folder, LOCK_FILE))}): two runs that save to one "
                    "folder would delete each other's checkpoints; stop that job, or choose another dirpath."
                )
            time.sleep(_PATIENCE_S / 10)
        self._held[folder] = handle
        note = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps(note).encode(), 0)
        commit.clear_unfinished(Path(folder))


def _locked(path: Path) -> int | None:
    """A handle with the lock, or None if somebody has it or has just removed the file."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle
    except (BlockingIOError, PermissionError):  # what POSIX lets a system say of a lock that somebody has
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _log.warning(
            "%s: the file system has no locks, so a second job would not be noticed (%s)", path, error
        )
        return handle
    os.close(handle)
    return None


def _owner(path: Path) -> str:
    try:
        note = json.loads(path.read_text())
        return f"process {note['pid']} on {note['host']} since {note['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "who has left no name"
