"""New files, hashed while they are written.

The disk begins with the first piece, not with fsync. The hash of memory that stays as it is comes after the last piece,
while the disk still works: earlier it would take the processor from those who feed the disk (two ranks of 242 MB each
on two cores: 1.09 s with the hash beside the writing, 0.92 s with the hash after it, 0.90 s without a hash). It runs
beside the writing as soon as it is far behind, and for memory that is about to be used for something else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import SimpleQueue
from threading import BoundedSemaphore, Thread

ALGORITHM = "sha256"
CHUNK = 8 << 20
"""Bytes that are written and hashed at a time."""
_SMALL = 1 << 20
_LAG = 4
_FAR_BEHIND = 256 << 20


class Sink(ABC):
    """Where the bytes of one new file go."""

    @abstractmethod
    def write(self, data: memoryview) -> None:
        """Appends all of ``data``."""

    @abstractmethod
    def commit(self) -> None:
        """Makes what was written durable, and closes."""

    @abstractmethod
    def abort(self) -> None:
        """Closes without a promise; also after :meth:`commit`, without effect then."""


class LocalSink(Sink):
    """A new file of a file system of this machine.

    Args:
        path: must not exist.
    """

    def __init__(self, path: Path) -> None:
        self._handle: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._offset = 0

    def write(self, data: memoryview) -> None:
        handle, rest = self._opened(), data
        while rest:
            rest = rest[os.write(handle, rest) :]
        # Begins to write these pages to disk and does not wait for them.
        with contextlib.suppress(OSError):
            os.posix_fadvise(handle, self._offset, len(data), os.POSIX_FADV_DONTNEED)
        self._offset += len(data)

    def commit(self) -> None:
        os.fsync(self._opened())
        self.abort()

    def abort(self) -> None:
        if self._handle is not None:
            handle, self._handle = self._handle, None
            os.close(handle)

    def _opened(self) -> int:
        if self._handle is None:
            raise ValueError("the file is closed")
        return self._handle


class Hasher:
    """A hash in a thread of its own. (Not an executor's: those take no work while the interpreter ends.)

    Args:
        algorithm: a name that :mod:`hashlib` knows.
    """

    def __init__(self, algorithm: str = ALGORITHM) -> None:
        self._digest = hashlib.new(algorithm)
        self._queue: SimpleQueue[tuple[memoryview, Callable[[], None] | None] | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._waiting = 0
        self._abandoned = False
        self._passing = BoundedSemaphore(_LAG)

    def update(
        self, data: memoryview, done: Callable[[], None] | None = None, *, stays: bool = False
    ) -> None:
        """Adds ``data``, which must not change before ``done`` is called, or before :meth:`close`.

        What ``stays`` may be hashed much later; of anything else only a few pieces are kept waiting.
        """
        if self._thread is None and not self._waiting and len(data) < _SMALL:
            self._add(data, done)
            return
        self._waiting += len(data)
        if stays:
            self._queue.put((data, done))
            if self._waiting > _FAR_BEHIND:
                self.start()
        else:
            self.start()
            self._passing.acquire()
            self._queue.put((data, self._let_pass(done)))

    def start(self) -> None:
        """Has it hash all that is there from now on, and what comes."""
        if self._thread is None and self._waiting:
            self._thread = Thread(target=self._work, name="checkpoint-hash", daemon=True)
            self._thread.start()

    def close(self) -> str:
        """The hash of everything, in hexadecimal."""
        self.start()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread, self._waiting = None, 0
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Ends without a hash; nothing that waits is looked at any more."""
        self._abandoned = True
        self.close()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            self._add(*item)

    def _let_pass(self, done: Callable[[], None] | None) -> Callable[[], None]:
        def passed() -> None:
            self._passing.release()
            if done is not None:
                done()

        return passed

    def _add(self, data: memoryview, done: Callable[[], None] | None) -> None:
        if not self._abandoned:
            self._digest.update(data)
        if done is not None:
            done()


class HashedFile:
    """A new file whose hash is known when it is finished. Leaving the context without finishing gives it up.

    Args:
        sink: where the bytes go.
        on_bytes: called with the number of bytes after each piece.
    """

    def __init__(self, sink: Sink, on_bytes: Callable[[int], None] | None = None) -> None:
        self._sink = sink
        self._on_bytes = on_bytes
        self._hash = Hasher()
        self._small: list[tuple[memoryview, bool]] = []
        self._small_size = 0
        self.size = 0

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._hash.abandon()
        self._sink.abort()

    def write(self, data: bytes | memoryview, *, stays: bool = False) -> None:
        """Appends ``data``, whose memory must not change before the file is finished.

        ``stays`` says that somebody else keeps that memory until then anyway, so that the hash may take its time.
        """
        view = memoryview(data)
        if len(view) < _SMALL:
            self._small.append((view, stays))
            self._small_size += len(view)
            if self._small_size >= _SMALL:
                self.flush()
            return
        self.flush()
        for start in range(0, len(view), CHUNK):
            self._put(view[start : start + CHUNK], stays)

    def flush(self) -> None:
        """Hands everything that was written to the operating system."""
        if self._small:
            small, self._small, self._small_size = self._small, [], 0
            joined = memoryview(b"".join(view for view, _ in small))
            if all(stays for _, stays in small):
                for view, _ in small:
                    self._hash.update(view, stays=True)
            else:
                self._hash.update(joined)
            self._write(joined)

    def start_hash(self) -> None:
        """Begins to hash what was written, if that has not begun: for a caller that will now wait for the disk."""
        self._hash.start()

    def finish(self) -> tuple[int, str]:
        """Makes the file durable and closes it. Returns its size and its hash in hexadecimal."""
        self.flush()
        self.start_hash()
        self._sink.commit()
        return self.size, self._hash.close()

    def _put(self, chunk: memoryview, stays: bool) -> None:
        self._hash.update(chunk, stays=stays)
        self._write(chunk)

    def _write(self, chunk: memoryview) -> None:
        self._sink.write(chunk)
        self.size += len(chunk)
        if self._on_bytes is not None:
            self._on_bytes(len(chunk))


def write_bytes(sink: Sink, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Writes a new file durably. Returns its size and hash."""
    with HashedFile(sink) as file:
        for piece in pieces:
            file.write(piece)
        return file.finish()
