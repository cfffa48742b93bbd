"""What must hold after the newer of the two specimens was damaged: it is refused by name, the older one is as it was."""

from __future__ import annotations

import re
from pathlib import Path

from tests.faults import specimen

SOURCES = (
    *(f"neuron_lightning/{folder}/*.py" for folder in ("checkpoint", "lightning", "optim")),
    "tests/faults/reshard_ranks.py",
)
_READ_BY = {
    "weights": re.compile(r"manifest\.json|rank-\d+\.model\.safetensors"),
    "optimizer": re.compile(r"manifest\.json|rank-\d+\.optimizer\.safetensors|trainer\..*"),
    "trainer": re.compile(r"manifest\.json|trainer\..*"),
    "rank 0": re.compile(r"manifest\.json|rank-00000\.state\..*"),
    "rank 1": re.compile(r"manifest\.json|rank-00001\.state\..*"),
    "export": re.compile(r"manifest\.json|rank-\d+\.model\.safetensors"),
}
"""Which files each part of a resume needs, and so must refuse when they are damaged."""


def examine(folder: Path, named: str | None) -> str:
    """What is wrong; empty if the damage is handled as it must be.

    Args:
        folder: holds the two checkpoints.
        named: the damaged file, which every error must name; None: some file must be named; empty: not known.
    """
    newer, older = folder / specimen.NEW, folder / specimen.OLD
    error = specimen.verify(newer)
    if not error:
        return "verification found nothing"
    if not _names(error, newer, named):
        return f"verification does not name it: {error}"
    refused = specimen.reader().attempts(newer)
    if named:
        for part, pattern in _READ_BY.items():
            if pattern.fullmatch(named) and part not in refused:
                return f"{part} was read from it"
    for part, message in refused.items():
        if not _names(message, newer, named):
            return f"{part} does not name it: {message}"
    if problem := specimen.verify(older):
        return f"the one before does not verify: {problem}"
    left = specimen.reader().attempts(older)
    return f"the one before does not load: {left}" if left else ""


def _names(error: str, checkpoint: Path, named: str | None) -> bool:
    if named == "manifest.json" and f"{checkpoint} is not a checkpoint" in error:
        return named in error
    if named:
        return f"{checkpoint}/{named} " in error or f"{checkpoint} holds {named!r}" in error
    return str(checkpoint) in error
