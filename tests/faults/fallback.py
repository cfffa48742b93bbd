"""What must hold after the newer of the two specimens was damaged: it is refused by name, the older one is as it was."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from neuron_lightning.lightning import resume
from tests.faults import specimen
from tests.faults.harness import Pools

SOURCES = (
    *(f"neuron_lightning/{folder}/*.py" for folder in ("checkpoint", "lightning", "optim")),
    "tests/faults/reshard_ranks.py",
)
_READ_BY = {
    "weights": re.compile(r"manifest\.json|rank-\d+\.model\.safetensors"),
    "optimizer": re.compile(r"manifest\.json|rank-\d+\.optimizer\.safetensors|trainer\.(json|safetensors)"),
    "trainer": re.compile(r"manifest\.json|trainer\.(json|safetensors)"),
    "rank 0": re.compile(r"manifest\.json|rank-00000\.state\.(json|safetensors)"),
    "rank 1": re.compile(r"manifest\.json|rank-00001\.state\.(json|safetensors)"),
    "export": re.compile(r"manifest\.json|rank-\d+\.model\.safetensors"),
}
"""Which files each part of a resume needs, and so must refuse when they are damaged."""


def examine(pools: Pools, folder: Path, named: str | None) -> str:
    """What is wrong; empty if the damage is handled as it must be.

    Args:
        pools: for the undamaged specimens.
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
    return _chosen(folder, named) or _is_whole(pools, older)


def _chosen(folder: Path, named: str | None) -> str:
    """What is wrong with the choice that ``auto_resume`` makes."""
    newer, older = folder / specimen.NEW, folder / specimen.OLD
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[ModelCheckpoint(dirpath=folder)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = resume.newest_intact(trainer)
    said = [str(w.message) for w in caught if "auto_resume" in str(w.message)]
    if path != str(older):
        return f"auto_resume chose {path}"
    there = (
        folder / specimen.NEW / "manifest.json"
    ).is_file()  # without it, it is no checkpoint to warn about
    wrong = there and (len(said) != 1 or not _names(said[0], newer, named))
    return f"auto_resume warned {said}" if wrong else ""


def _is_whole(pools: Pools, older: Path) -> str:
    """What is wrong with the older checkpoint, loaded over whatever the refused one has left."""
    if problem := specimen.verify(older):
        return f"the one before does not verify: {problem}"
    if left := specimen.reader().attempts(older):
        return f"the one before does not load: {left}"
    same = specimen.equal(specimen.reader().contents(), specimen.expected(pools, specimen.OLD))
    return "" if same else "the one before loads to something else"


def _names(error: str, checkpoint: Path, named: str | None) -> bool:
    if named == "manifest.json" and f"{checkpoint} is not a checkpoint" in error:
        return named in error
    if named:
        whole_name = re.escape(f"{checkpoint}/{named}") + r"(?![\w.-])"
        return re.search(whole_name, error) is not None or f"{checkpoint} holds {named!r}" in error
    return str(checkpoint) in error
