"""Lightning's own ``.ckpt`` files under our strategy: resumed from at any layout, and made from our folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from neuron_lightning.checkpoint import commit
from neuron_lightning.checkpoint.formats import lightning_file, loading, neuron
from neuron_lightning.checkpoint.formats.contents import Contents, Progress
from neuron_lightning.errors import CheckpointError
from neuron_lightning.lightning.checkpoint_io import show_transfer


class PlainFile:
    """A Lightning checkpoint file that a run is restored from.

    Args:
        path: the file.
        trusted: let it run code; only where the user has said so.

    Raises:
        CheckpointError: code in it, or no Lightning checkpoint.
    """

    def __init__(self, path: Path, *, trusted: bool = False) -> None:
        self._path = path
        self._document = lightning_file.load(path, trusted=trusted)

    def trainer_state(self) -> dict[str, Any]:
        """Everything but weights and optimizer state, as a Trainer restores it."""
        state = lightning_file.trainer_state(self._document)
        if "optimizer_states" in self._document:
            state["optimizer_states"] = []
        return state

    def load_module(self, module: nn.Module, strict: bool, progress: Progress) -> None:
        """Fills the module's shards. All ranks together. Raises :class:`CheckpointError`."""
        parameters = dict(module.named_parameters())
        loading.load_module(
            self._path,
            self._contents((), parameters),
            module.state_dict(),
            parameters,
            strict=strict,
            progress=progress,
        )

    def load_optimizers(self, optimizers: Sequence[Any], module: nn.Module, progress: Progress) -> None:
        """Gives the optimizers their state. All ranks together. Raises :class:`CheckpointError`."""
        parameters = dict(module.named_parameters())
        contents = self._contents(optimizers, parameters)
        loading.load_optimizers(self._path, contents, optimizers, parameters, progress=progress)

    def _contents(self, optimizers: Sequence[Any], parameters: dict[str, nn.Parameter]) -> Contents:
        document = self._document if optimizers else {**self._document, "optimizer_states": []}
        return loading.lightning_contents(self._path, document, optimizers, parameters)


def merge_checkpoint(files: Sequence[str | Path], output: str | Path) -> None:
    """Makes one Lightning ``.ckpt`` file of a checkpoint; one process calls it.

    Args:
        files: the checkpoint's folder, or files in it (all of one folder).
        output: the file to write; must not exist.

    Raises:
        CheckpointError: not files of one checkpoint, damaged, or ``output`` exists.
    """
    folders = {_folder_of(Path(file)) for file in files}
    if len(folders) != 1:
        shown = ", ".join(sorted(str(folder) for folder in folders)) or "none"
        raise CheckpointError(f"the files to merge must be of one checkpoint, but they are of {shown}.")
    folder = folders.pop()
    with show_transfer("Merging", folder) as progress:
        contents = neuron.read(folder, progress=progress)
        lightning_file.write(Path(output), contents, progress=progress)


def _folder_of(file: Path) -> Path:
    folder = file if file.is_dir() else file.parent
    if not commit.is_committed(folder):
        commit.locate(file)
    return folder
