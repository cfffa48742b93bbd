"""The checkpoint plugin that Lightning sees, and the bar over a save or load that takes long.

Sharded folders are written and read by the strategy, on all ranks together and straight from its shards; Lightning's
plugin interface passes whole dictionaries on one rank. So the plugin loads what is in a folder besides the shards,
removes folders, reads plain Lightning files without unpickling code, and says clearly what it does not do.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from neuron_lightning.checkpoint import exchange, folder
from neuron_lightning.errors import CheckpointError

_QUIET_S = 2.0
"""Saves and loads that take less time show nothing."""
_LINE_S = 10.0
"""Without a terminal: seconds between lines."""


class NeuronCheckpointIO(CheckpointIO):
    """Checkpoints as folders of safetensors and JSON, through :class:`~neuron_lightning.NeuronXLAStrategy`.

    Args:
        save_load_xser: NxD's choice of file format; accepted and without effect, since there is one format.
        weights_only: NxD's argument; accepted. Folders hold no pickle, and plain files are read with torch's
            weights-only unpickler unless ``load_checkpoint`` is told otherwise by the caller.
    """

    def __init__(self, save_load_xser: bool = True, weights_only: bool = False) -> None:
        self.save_load_xser = save_load_xser
        self.weights_only = weights_only

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Not possible for a plain dictionary on one rank.

        Raises:
            CheckpointError: always; it says what to use instead.
        """
        raise CheckpointError(
            f"NeuronCheckpointIO cannot write {path} from a dictionary on one rank: sharded folders are written by "
            "NeuronXLAStrategy on all ranks together. Use trainer.save_checkpoint(path) under NeuronXLAStrategy, or "
            "leave NeuronCheckpointIO out of the plugins of other strategies."
        )

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """What a checkpoint holds, on one rank.

        Args:
            path: a folder of ours, or a plain Lightning ``.ckpt`` file.
            map_location: for plain files, as ``torch.load`` takes it; folders are read to the CPU.
            weights_only: an explicit False lets a plain file run code; trusted files only.

        Returns:
            The trainer state, with ``state_dict`` holding whole tensors by canonical name.

        Raises:
            CheckpointError: neither of the two, or damaged.
        """
        source = Path(path)
        if source.is_file():
            loaded: dict[str, Any] = torch.load(
                source, map_location=map_location or "cpu", weights_only=weights_only is not False
            )
            return loaded
        return {**folder.read_trainer_state(source), "state_dict": folder.read_full_state(source)}

    def remove_checkpoint(self, path: Any) -> None:
        """Deletes a checkpoint, un-committing it first; one rank calls it. No error if there is none."""
        folder.remove_checkpoint(path)


@contextmanager
def show_transfer(verb: str, path: Any) -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback for the checkpoint functions that shows itself on rank 0 after two seconds.

    In a terminal it is a bar, elsewhere a line every ten seconds; at the end of a long one, how long it took.

    Args:
        verb: ``Saving`` or ``Loading``.
        path: the checkpoint.
    """
    shown = _Transfer(verb, str(path))
    try:
        yield shown.update if exchange.world()[0] == 0 else _unseen
    finally:
        shown.close()
    if (seconds := time.monotonic() - shown.started) > _QUIET_S:
        rank_zero_info(f"{verb} {path} took {seconds:.1f} s.")


class _Transfer:
    """Bar or lines over one save or load."""

    def __init__(self, verb: str, path: str) -> None:
        self._what = f"{verb} {path}"
        self.started = time.monotonic()
        self._next_line = self.started + _QUIET_S
        self._bar: tqdm[Any] | None = None
        self._stage = ""

    def update(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.started < _QUIET_S or not total:
            return
        if not sys.stderr.isatty():
            if now >= self._next_line:
                self._next_line = now + _LINE_S
                rank_zero_info(f"{self._what}: {stage} {100 * done // total} % of {total / 1e6:,.0f} MB")
            return
        if stage != self._stage:
            self.close()
            self._stage = stage
        if self._bar is None:
            self._bar = tqdm(
                desc=f"{self._what} ({stage})",
                total=total,
                unit="B",
                unit_scale=True,
                leave=False,
                dynamic_ncols=True,
            )
        self._bar.n = done
        self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _unseen(stage: str, done: int, total: int) -> None:
    """Progress on a rank that shows nothing."""
