"""A progress bar for log files, and how to know that the output is one."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

LINE_SECONDS = 5.0


class LineBar(Tqdm):
    """A bar for files: whole lines, at most one in ``line_seconds``, and one at the end.

    Args:
        line_seconds: the least time between two lines.
        **kwargs: as :class:`tqdm.tqdm` takes them.
    """

    def __init__(self, *, line_seconds: float = LINE_SECONDS, **kwargs: Any) -> None:
        self._line_seconds = line_seconds
        self._next_line = 0.0
        self._line = ""
        self.disable: bool = False
        super().__init__(**kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Writes a line if it is time for one."""
        if self.n and time.monotonic() >= self._next_line:
            self._write_line()
        return True

    def clear(self, nolock: bool = False) -> None:
        """Nothing to clear: lines stay."""

    def reset(self, total: float | None = None) -> None:
        """Starts the count again, after a last line of the one before."""
        if self.n:
            self._write_line()
        super().reset(total)

    def close(self) -> None:
        """Writes the last line."""
        if self.disable:
            return
        self.disable = True
        self._decr_instances(self)
        if self.n:
            self._write_line()

    def _write_line(self) -> None:
        line = self._text()
        if line == self._line:
            return
        self._line = line
        self._next_line = time.monotonic() + self._line_seconds
        self.fp.write(line + "\n")
        self.fp.flush()

    def _text(self) -> str:
        total = f"/{self.total}" if self.total else ""
        parts = [f"{str(self.desc).removesuffix(': ')}: {self.unit} {self.n}{total}"]
        if self.postfix:
            parts.append(self.postfix)
        elapsed = float(self.format_dict["elapsed"])
        done = self.n - self.initial
        parts.append(self.format_interval(elapsed))
        if self.total and done > 0 and self.n < self.total:
            parts[-1] += f" < {self.format_interval(elapsed / done * (self.total - self.n))}"
        return " | ".join(parts)


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config
