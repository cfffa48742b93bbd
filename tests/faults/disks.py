"""Other file systems and full ones: a small tmpfs of our own where mounting is allowed, else what the system offers."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.faults.harness import Unavailable

_RAM = Path("/dev/shm")


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of ``num_bytes`` at ``folder``, gone afterwards.

    Raises:
        Unavailable: this process may not mount.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "faults", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Unavailable("there is no mount command") from error
    if done.returncode:
        raise Unavailable(f"a small disk cannot be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def other_filesystem(than: Path) -> Iterator[Path]:
    """An empty folder on another file system than ``than``.

    Raises:
        Unavailable: there is none.
    """
    if _RAM.is_dir() and os.access(_RAM, os.W_OK) and _RAM.stat().st_dev != than.stat().st_dev:
        folder = Path(tempfile.mkdtemp(prefix="faults-", dir=_RAM))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    with small_disk(than / "other", 64 << 20) as folder:
        yield folder


def fill(folder: Path) -> Path:
    """Writes a file beside everything else until the disk is full; the file, to be deleted."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2
    return ballast


@contextlib.contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond ``num_bytes`` (EFBIG): a stand-in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
