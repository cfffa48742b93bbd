"""Checkpoints behind an fsspec URL: object stores, which have no rename.

Every file of an attempt carries the attempt's id in its name, and ``manifest.json``, which alone has a fixed name, is
written last. That put is the commit: until it is done the folder holds the checkpoint that was there before, from then
on the new one, and there is no moment without one. What a crashed attempt left is listed in no manifest: it is ignored
when a checkpoint is read and removed by the next save of that name.

The store must make a put visible all at once or not at all, as S3, Google Cloud Storage and Azure Blob do. Drivers are
imported only when a URL names them.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator
from typing import Any

from neuron_lightning.checkpoint import manifest, points
from neuron_lightning.checkpoint.commit import MANIFEST
from neuron_lightning.checkpoint.output import Sink
from neuron_lightning.checkpoint.storage import FileReader, Folder, Place
from neuron_lightning.errors import CheckpointError

_LEFT_BY_A_SAVE = re.compile(r"attempt-[0-9a-f]{16}\.[\w.-]+", re.ASCII)


class RemotePlace(Place):
    """A folder (a common prefix) of an object store.

    Args:
        url: such as ``s3://bucket/run/step=300``.

    Raises:
        CheckpointError: no driver for such URLs is installed, or the URL makes no sense to it.
    """

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        self._fs, self._root = _resolve(self.name)

    def is_committed(self) -> bool:
        with _told(f"look for {self.name}"):
            self._fs.invalidate_cache()
            return bool(self._fs.isfile(self._at(MANIFEST)))

    def open(self) -> Folder:
        if not self.is_committed():
            raise CheckpointError(
                f"there is no checkpoint at {self.name}: it holds no {MANIFEST}; check the URL."
            )
        return RemoteFolder(self._fs, self._root, self.name)

    def prepare(self) -> str:
        present, listed = self._names(), self._listed()
        if strange := [n for n in present if n != MANIFEST and not _LEFT_BY_A_SAVE.fullmatch(n)]:
            raise CheckpointError(
                f"{self.name} holds {strange[0]!r}, which is no part of a checkpoint: choose another name or remove it; "
                "it is left as it is."
            )
        if listed is not None:
            self._delete([name for name in present if name not in listed and name != MANIFEST])
        with _told(f"make {self.name}"):
            self._fs.makedirs(self._root, exist_ok=True)
        points.reach("prepared")
        return f"attempt-{secrets.token_hex(8)}"

    def file_name(self, base: str, attempt: str) -> str:
        return f"{attempt}.{base}"

    def create(self, name: str, attempt: str) -> Sink:
        return _RemoteSink(self._fs, self._at(name), f"{self.name}/{name}")

    def sync(self, attempt: str) -> None:
        """Nothing to do: an object is durable when its writing has ended."""

    def written_size(self, name: str, attempt: str) -> int:
        return RemoteFolder(self._fs, self._root, self.name).size(name)

    def publish(self, manifest: bytes, attempt: str) -> None:
        points.reach("before_rename")
        with _told(f"write {self.name}/{MANIFEST}"):
            self._fs.pipe_file(self._at(MANIFEST), manifest)
        points.reach("after_rename")
        old = [name for name in self._names() if name != MANIFEST and not name.startswith(f"{attempt}.")]
        if old:
            # The new checkpoint stands; what cannot be deleted now, the next save of this name deletes.
            with contextlib.suppress(CheckpointError):
                self._delete(old)
            points.reach("old_removed")

    def discard(self, attempt: str) -> None:
        with contextlib.suppress(CheckpointError):
            listed = self._listed()
            mine = [name for name in self._names() if name.startswith(f"{attempt}.")]
            if listed is not None and not listed.intersection(mine):
                self._delete(mine)

    def remove(self) -> None:
        present = self._names()
        if strange := [n for n in present if n != MANIFEST and not _LEFT_BY_A_SAVE.fullmatch(n)]:
            raise CheckpointError(
                f"{self.name} is not a checkpoint (it holds {strange[0]!r}): it is left as it is."
            )
        if MANIFEST in present:
            self._delete([MANIFEST])
            points.reach("remove_renamed")
        self._delete([name for name in present if name != MANIFEST])

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _names(self) -> list[str]:
        """What is there; nothing where the folder does not exist."""
        with _told(f"list {self.name}"):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
        names = [str(path).rstrip("/").rpartition("/")[2] for path in found if path.rstrip("/") != self._root]
        return sorted(name for name in names if name)

    def _listed(self) -> set[str] | None:
        """Files of the committed checkpoint (none if there is none); None if its manifest cannot be read."""
        if not self.is_committed():
            return set()
        try:
            return set(manifest.read(RemoteFolder(self._fs, self._root, self.name)).files)
        except CheckpointError:
            return None

    def _delete(self, names: list[str]) -> None:
        if names:
            with _told(f"delete {len(names)} files of {self.name}"):
                self._fs.rm([self._at(name) for name in names])


class RemoteFolder(Folder):
    """The files of a committed checkpoint in an object store."""

    def __init__(self, fs: Any, root: str, url: str) -> None:
        self.name = url
        self._fs, self._root = fs, root

    def open(self, file: str) -> FileReader:
        return _RemoteReader(self._fs, f"{self._root}/{file}", self.where(file), self.size(file))

    def size(self, file: str) -> int:
        with _told(f"read {self.where(file)}"):
            try:
                facts = self._fs.info(f"{self._root}/{file}")
            except FileNotFoundError:
                raise CheckpointError(
                    f"{self.where(file)} is missing: the checkpoint is incomplete."
                ) from None
        if facts["type"] != "file":
            raise CheckpointError(f"{self.where(file)} is not a file.")
        return int(facts["size"])

    def strangers(self, known: set[str]) -> list[str]:
        names = RemotePlace(self.name)._names()
        return [name for name in names if name not in known and not _LEFT_BY_A_SAVE.fullmatch(name)]


class _RemoteReader(FileReader):
    """Ranged reads of one object."""

    def __init__(self, fs: Any, path: str, where: str, size: int) -> None:
        self._fs, self._path, self.where, self.size = fs, path, where, size

    def close(self) -> None:
        """Nothing is held between reads."""

    def _fill(self, offset: int, data: memoryview) -> None:
        if not data:
            return
        with _told(f"read {self.where}"):
            found = self._fs.cat_file(self._path, start=offset, end=offset + len(data))
        if len(found) != len(data):
            raise CheckpointError(f"{self.where} ends before {offset + len(data)} bytes: it is damaged.")
        data[:] = found


class _RemoteSink(Sink):
    """A new object, uploaded in parts by its driver."""

    def __init__(self, fs: Any, path: str, where: str) -> None:
        self._where = where
        with _told(f"write {where}"):
            self._file: Any = fs.open(path, "wb")

    def write(self, data: memoryview) -> None:
        with _told(f"write {self._where}"):
            self._file.write(data)

    def commit(self) -> None:
        file, self._file = self._file, None
        with _told(f"write {self._where}"):
            file.close()

    def abort(self) -> None:
        """Gives the upload up where the driver can; what is left otherwise is in no manifest."""
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(CheckpointError), _told(f"give up {self._where}"):
                getattr(file, "discard", file.close)()


def committed_in(url: str) -> list[str]:
    """URLs of the committed checkpoints directly below ``url``; none if it does not exist."""
    fs, root = _resolve(url.rstrip("/"))
    with _told(f"list {url}"):
        fs.invalidate_cache()
        try:
            entries = fs.ls(root, detail=True)
        except FileNotFoundError:
            return []
        folders = [entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory"]
        names = [path.rpartition("/")[2] for path in folders if fs.isfile(f"{path}/{MANIFEST}")]
    return [f"{url.rstrip('/')}/{name}" for name in sorted(names)]


def _resolve(url: str) -> tuple[Any, str]:
    """The file system behind a URL, and the path in it."""
    try:
        import fsspec

        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"{url} cannot be used: {error}") from error
    return fs, str(root).rstrip("/")


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Any error of a driver as ours: each driver raises its own types, and all ranks must hear of it."""
    try:
        yield
    except (CheckpointError, FileNotFoundError):
        raise
    except Exception as error:
        raise CheckpointError(f"cannot {what}: {type(error).__name__}: {error}") from error
