"""Writes checkpoints at once or in the background, and does what has to wait for their commit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from neuron_lightning.checkpoint import AsyncSaver, folder
from neuron_lightning.checkpoint.plan import Planner
from neuron_lightning.config import AsyncSave
from neuron_lightning.errors import CheckpointError
from neuron_lightning.lightning.checkpoint_io import show_transfer

_POLL_S = 0.05


class Commit:
    """What rank 0 does once one save is committed, whichever thread gets there first; nothing if it fails."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._committed = False
        self._actions: list[Callable[[], None]] = []

    def then(self, action: Callable[[], None]) -> None:
        """Does ``action`` now if the commit is there, else right after it."""
        with self._lock:
            if not self._committed:
                self._actions.append(action)
                return
        _do(action)

    def arrive(self) -> None:
        """The save is committed."""
        with self._lock:
            self._committed = True
            actions, self._actions = self._actions, []
        for action in actions:
            _do(action)


class Saves:
    """The saves of one strategy. Every method that writes or waits is called by all ranks together.

    Args:
        mode: how to save in the background; None writes while training waits.
    """

    def __init__(self, mode: AsyncSave | None) -> None:
        self._mode = mode
        self._saver: AsyncSaver | None = None
        self._planner = Planner()
        self._commit = Commit()
        self._commit.arrive()
        self._later: list[Callable[[], None]] = []

    def open(self) -> None:
        """Makes the process group of background saving. All ranks together, before training.

        A rank that is lost while a group is being made leaves its peers waiting for its address, deaf to signals;
        so it is made where all the other groups are, and not by the first save.
        """
        if self._mode is not None and self._saver is None:
            self._saver = AsyncSaver(memory_budget=self._mode.memory_budget)

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed on this rank that nobody has heard of yet."""
        return self._saver is not None and self._saver.failed

    def write(self, path: Any, *, background: bool, **what: Any) -> None:
        """Writes one checkpoint, or takes its snapshot and lets it be written.

        Args:
            path: the folder.
            background: whether it may be written in the background.
            what: as :func:`neuron_lightning.checkpoint.write_checkpoint` takes it.

        Raises:
            CheckpointError: on all ranks.
        """
        self.wait()
        commit = Commit()
        if self._mode is not None and background:
            self.open()
            assert self._saver is not None
            self._commit = commit
            self._saver.save(path, on_commit=commit.arrive, **what)
            return
        with show_transfer("Saving", path) as progress:
            folder.write_checkpoint(path, progress=progress, planner=self._planner, **what)
        commit.arrive()
        self._commit = commit

    def then(self, action: Callable[[], None]) -> None:
        """On this rank: right after the commit of the last save, perhaps in another thread."""
        self._commit.then(action)

    def later(self, action: Callable[[], None]) -> None:
        """On this rank, in the thread that trains: when it next looks after the commit of the last save."""
        self._later.append(action)
        self.look()

    def look(self) -> None:
        """Does what :meth:`later` was told, if nothing is in flight; costs nothing."""
        if self._saver is None or (self._saver.pending is None and not self._saver.failed):
            later, self._later = self._later, []
            for action in later:
                action()

    def wait(self) -> None:
        """Until nothing is in flight. Raises the :class:`CheckpointError` of a save that failed, on all ranks."""
        if self._saver is not None:
            try:
                self._saver.wait()
            except CheckpointError:
                self._later = []
                raise
        self.look()

    def wait_alone(self, seconds: float) -> None:
        """This rank only, for at most so long; for when other ranks may be gone."""
        deadline = time.monotonic() + seconds
        while self._saver is not None and self._saver.pending is not None and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Gives the memory and the process group of background saving back, unless one never ended."""
        saver, self._saver, self._later = self._saver, None, []
        self._planner = Planner()
        if saver is None or saver.pending is not None:
            return
        try:
            saver.close()
        except CheckpointError as error:  # training has ended for another reason, which is being reported
            rank_zero_warn(f"{error}")


def _do(action: Callable[[], None]) -> None:
    try:
        action()
    except (OSError, CheckpointError) as error:
        rank_zero_warn(f"the checkpoint is saved, but what follows a save failed: {error}")
