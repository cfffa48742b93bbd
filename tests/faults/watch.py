"""Sees what reading a checkpoint touches: files outside it, code that runs, memory and time that it takes."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_IN_ALL = 0x00000FFF
_EXECUTES = ("exec", "compile", "pickle.find_class", "subprocess.Popen", "ctypes.dlopen", "socket.connect")
_CHANGES = (
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate",
    "os.utime", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.putenv", "shutil.rmtree", "shutil.move",
)  # fmt: skip
MAX_CPU_S = 2.0
MAX_GROWTH_BYTES = 64 << 20


class _Audit:
    """Python's audit hooks cannot be taken away again: one for the process, looking only while it is asked to."""

    def __init__(self) -> None:
        self.allowed: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.allowed is None:
            return
        if event in _EXECUTES or event in _CHANGES:
            self.seen.append(f"{event} {arguments!r}"[:200])
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes or os.path.commonpath((path, self.allowed)) != self.allowed:
                self.seen.append(f"open {path!r}"[:200])


_audit: list[_Audit] = []


class Watch:
    """Nothing may be executed, written, or opened outside of ``checkpoint`` while :meth:`looking`.

    Args:
        checkpoint: what may be read.
        outside: a folder in which any access at all is seen, whoever makes it.

    Attributes:
        seen: what was done nevertheless.
    """

    def __init__(self, checkpoint: Path, outside: Path) -> None:
        if not _audit:
            _audit.append(_Audit())
        self.seen: list[str] = []
        self._allowed, self._outside = os.path.abspath(checkpoint), outside

    def __enter__(self) -> Watch:
        libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = libc.inotify_init1(os.O_NONBLOCK)
        if (
            self._inotify < 0
            or libc.inotify_add_watch(self._inotify, os.fsencode(self._outside), _IN_ALL) < 0
        ):
            raise OSError(ctypes.get_errno(), "inotify")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._inotify)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Looks while it runs."""
        _audit[0].seen, _audit[0].allowed = self.seen, self._allowed
        try:
            yield
        finally:
            _audit[0].allowed = None
            if self._touched():
                self.seen.append(f"{self._outside} was opened or changed")

    def _touched(self) -> bool:
        try:
            return bool(os.read(self._inotify, 1 << 16))
        except BlockingIOError:
            return False


class Budget:
    """Processor time and growth of peak memory of one thing after another."""

    def __init__(self) -> None:
        self.worst_cpu_s = 0.0
        self.growth = 0
        self._first = self._peak()

    @contextmanager
    def spent(self) -> Iterator[None]:
        """Counts what runs inside."""
        begun = time.process_time()
        yield
        self.worst_cpu_s = max(self.worst_cpu_s, time.process_time() - begun)
        self.growth = self._peak() - self._first

    @property
    def exceeded(self) -> str:
        """What was too much; empty if nothing was."""
        if self.worst_cpu_s > MAX_CPU_S:
            return f"{self.worst_cpu_s:.1f} s of processor time"
        return f"{self.growth >> 20} MiB more memory" if self.growth > MAX_GROWTH_BYTES else ""

    @staticmethod
    def _peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
