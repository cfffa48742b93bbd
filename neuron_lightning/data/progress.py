"""A progress bar that appears only when something takes longer than two seconds."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_DELAY_S = 2.0


def progress_bar(description: str, total_bytes: int, *, disable: bool = False) -> Any:
    """A tqdm bar over bytes; in a log file (no terminal) it writes a line every ten seconds only.

    Args:
        description: what is being done, e.g. ``packing``.
        total_bytes: bytes to go.
        disable: show nothing.
    """
    return tqdm(
        total=total_bytes,
        desc=description,
        unit="B",
        unit_scale=True,
        delay=_DELAY_S,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        disable=disable,
    )
