"""The embedded corpus: the text of the running Python's standard library, so that nothing is downloaded."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from neuron_lightning.data.sources import TextSource
from neuron_lightning.errors import DataError

_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
)
"""Folders without text of the library itself; ``encodings`` is a hundred tables so alike that a held-out one would
say nothing."""


def standard_library(max_bytes: int | None = None) -> TextSource:
    """The ``*.py`` files of the standard library without its tests and tables, sorted by name.

    Args:
        max_bytes: stop before this size is exceeded (None: everything, about 11 MB).

    Raises:
        DataError: this Python carries no readable standard library (for example a zipped one).
    """
    root = Path(sysconfig.get_paths()["stdlib"]).resolve()
    files = [f for f in sorted(root.rglob("*.py")) if not _LEFT_OUT & set(f.relative_to(root).parts)]
    chosen = _readable(files, max_bytes)
    if not chosen:
        raise DataError(
            f"the standard library at {root} holds no readable *.py file"
            + (f" within {max_bytes} bytes" if max_bytes is not None else "")
            + ": pass your own text with --data."
        )
    return TextSource(tuple(chosen), root)


def _is_text(file: Path) -> bool:
    try:
        raw = file.read_bytes()
        raw.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return len(raw) > 0 and b"\0" not in raw


def _readable(files: list[Path], max_bytes: int | None) -> list[Path]:
    chosen, total = [], 0
    for file in files:
        if not _is_text(file):
            continue
        total += file.stat().st_size
        if max_bytes is not None and total > max_bytes:
            break
        chosen.append(file)
    return chosen
