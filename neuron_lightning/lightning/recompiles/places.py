"""Where in the user's code something was called from."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from types import CodeType, FrameType

import lightning
import lightning_utilities
import torch
import torchmetrics

_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
_FOREIGN = tuple(
    os.path.dirname(os.path.abspath(module.__file__ or "")) + os.sep
    for module in (torch, lightning, lightning_utilities, torchmetrics, os)
)
_NOBODYS: dict[CodeType, int] = {}
"""By code object: 0 for the user's, 1 for this package's, 2 for torch's, Lightning's and Python's own."""


@dataclass(frozen=True)
class Place:
    """A line of a source file."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{os.path.relpath(self.file) if self.file.startswith(os.getcwd()) else self.file}:{self.line} in {self.function}"


def place_of_caller() -> Place | None:
    """The innermost line of the user's on the stack; without one, the innermost of this package's."""
    frame: FrameType | None = sys._getframe(1)
    ours: FrameType | None = None
    while frame is not None:
        whose = _whose(frame.f_code)
        if whose == 0:
            return _place(frame)
        if whose == 1 and ours is None and f"{os.sep}recompiles{os.sep}" not in frame.f_code.co_filename:
            ours = frame
        frame = frame.f_back
        if frame is not None and frame.f_code.co_name == "_call_strategy_hook":
            break  # the Trainer's loop: from here on nobody's line says anything
    return None if ours is None else _place(ours)


def called_by_package() -> bool:
    """Whether the innermost frame that is not torch's belongs to this package: it knows what it reads."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and _whose(frame.f_code) == 2:
        frame = frame.f_back
    return frame is not None and _whose(frame.f_code) == 1


def _whose(code: CodeType) -> int:
    whose = _NOBODYS.get(code)
    if whose is None:
        file = code.co_filename
        third = file.startswith(_FOREIGN) or "torch_xla" in file or file.startswith("<")
        whose = _NOBODYS[code] = 2 if third else int(file.startswith(_PACKAGE))
    return whose


def _place(frame: FrameType) -> Place:
    return Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
