"""How far a long piece of work is: a bar in a terminal, lines elsewhere, nothing in the first two seconds."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

_QUIET_S = 2.0
_LINE_S = 10.0


class Transfer:
    """A ``progress(stage, done, total)`` callback that shows itself on standard error.

    Args:
        what: what is being done, e.g. ``"Converting a to b"``.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._started = time.monotonic()
        self._next_line = self._started + _QUIET_S
        self._bar: tqdm[Any] | None = None
        self._stage = ""

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._started < _QUIET_S or not total:
            return
        if not sys.stderr.isatty():
            if now >= self._next_line:
                self._next_line = now + _LINE_S
                text = f"{self._what}: {stage} {100 * done // total} % of {total / 1e6:,.0f} MB"
                print(text, file=sys.stderr, flush=True)
            return
        if stage != self._stage:
            self._close()
            self._stage = stage
            self._bar = tqdm(
                desc=f"{self._what} ({stage})",
                total=total,
                unit="B",
                unit_scale=True,
                leave=False,
                dynamic_ncols=True,
            )
        if self._bar is not None:
            self._bar.n = done
            self._bar.refresh()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
