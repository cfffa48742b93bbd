"""What ``torch.compile`` has compiled again, and why."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Recompile:
    """A function that was compiled again."""

    place: str
    reason: str


class DynamoWatch:
    """Reads the compiler's own records; imports nothing that is not in use."""

    def __init__(self) -> None:
        self._seen = {id(entry) for entry in _records()}
        self._kept = list(_records())

    def new(self) -> list[Recompile]:
        """The recompilations since the last call."""
        entries = [entry for entry in _records() if id(entry) not in self._seen]
        self._kept = list(_records())  # so that no identity is used again while it counts
        self._seen = {id(entry) for entry in self._kept}
        return [_described(entry) for entry in entries if getattr(entry, "recompile_reason", None)]


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``Module.compile`` was used on a part of a module."""
    return any(
        type(part).__name__ == "OptimizedModule" or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )


def _records() -> list[Any]:
    utils: Any = sys.modules.get("torch._dynamo.utils")
    read = getattr(utils, "get_compilation_metrics", None)
    return [] if read is None else list(read())


def _described(entry: Any) -> Recompile:
    file, line = getattr(entry, "co_filename", "?"), getattr(entry, "co_firstlineno", "?")
    return Recompile(
        f"{file}:{line} in {getattr(entry, 'co_name', '?')}", str(entry.recompile_reason).strip()
    )
