"""Where checkpoints live: on a file system of this machine, or behind an fsspec URL.

A :class:`Place` is one checkpoint's name. It knows how files get there, how they become a checkpoint, and how they
are read. File systems commit by a rename (:mod:`commit`); object stores, which have none, by the manifest's own put
(:mod:`remote`).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

from neuron_lightning.checkpoint import commit, points
from neuron_lightning.checkpoint.output import LocalSink, Sink, write_bytes
from neuron_lightning.errors import CheckpointError

_LOCAL_SCHEMES = ("file://", "local://")


class Place(ABC):
    """Where one checkpoint is, or will be.

    Attributes:
        name: path or URL, for messages.
    """

    name: str

    @abstractmethod
    def prepare(self) -> str:
        """Makes room for new files and removes what interrupted saves left; one rank calls it.

        Returns:
            The attempt's id, which every other rank passes to the methods below.

        Raises:
            CheckpointError: something that is no checkpoint stands in the way.
        """

    @abstractmethod
    def file_name(self, base: str, attempt: str) -> str:
        """The name under which an attempt stores the file ``base``."""

    @abstractmethod
    def create(self, name: str, attempt: str) -> Sink:
        """A new file of an attempt."""

    @abstractmethod
    def sync(self, attempt: str) -> None:
        """Makes the names of this rank's new files durable."""

    @abstractmethod
    def written_size(self, name: str, attempt: str) -> int:
        """Size of a file of an attempt. Raises :class:`CheckpointError` if it is not there."""

    @abstractmethod
    def publish(self, manifest: bytes, attempt: str) -> None:
        """Commits an attempt: from here on, and not before, it is the checkpoint. One rank calls it."""

    @abstractmethod
    def discard(self, attempt: str) -> None:
        """Removes what an attempt that failed has written. One rank calls it."""

    @abstractmethod
    def remove(self) -> None:
        """Deletes the checkpoint, which first stops being one. No error if there is none. One rank calls it."""


class LocalPlace(Place):
    """A folder of a POSIX file system that all ranks share."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self.name = str(self.path)

    def prepare(self) -> str:
        commit.prepare(self.path)
        return ""

    def file_name(self, base: str, attempt: str) -> str:
        return base

    def create(self, name: str, attempt: str) -> Sink:
        return LocalSink(self._folder() / name)

    def sync(self, attempt: str) -> None:
        commit.sync_folder(self._folder())

    def written_size(self, name: str, attempt: str) -> int:
        return commit.require_regular(self._folder() / name)

    def publish(self, manifest: bytes, attempt: str) -> None:
        write_bytes(LocalSink(self._folder() / commit.MANIFEST), [manifest])
        points.reach("manifest_written")
        commit.publish(self.path)

    def discard(self, attempt: str) -> None:
        commit.discard(self.path)

    def remove(self) -> None:
        commit.remove(self.path)

    def _folder(self) -> Path:
        if not (folder := commit.temporary(self.path)).is_dir():
            raise CheckpointError(
                f"{folder}, which rank 0 made, is not there: a checkpoint needs a file system that all ranks share."
            )
        return folder


def place(path: str | Path) -> Place:
    """The place of that name: a path, a ``file://`` URL, or any other URL that fsspec knows."""
    text = os.fspath(path)
    for scheme in _LOCAL_SCHEMES:
        text = text.removeprefix(scheme)
    return LocalPlace(Path(text))
