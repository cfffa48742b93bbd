"""The strategy's side of checkpoints: what is saved when, and how a run gets it back.

A checkpoint is a folder that :mod:`neuron_lightning.checkpoint` writes and reads on all ranks together. Saves
happen at optimizer-step boundaries only, because gradients of an unfinished accumulation window are in no
checkpoint: a trigger inside a window is carried out at its end, and deletions wait for the saves before them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from neuron_lightning.backends import get_backend
from neuron_lightning.checkpoint import folder
from neuron_lightning.errors import CheckpointError
from neuron_lightning.lightning import internals
from neuron_lightning.lightning.checkpoint_io import show_transfer
from neuron_lightning.parallel import mesh
from neuron_lightning.parallel.random import get_rng_state, set_rng_state

_IN_FOLDER = ("state_dict", "optimizer_states")


class CheckpointMixin(ParallelStrategy):
    """Saving, loading and removing of the strategy."""

    state_dict_type: str
    _deferred: list[Callable[[], None]]
    last_saved: str | None = None
    """Path of the last checkpoint that this strategy wrote."""
    _restored_from: Path | None = None
    _training_ended: bool = False
    _rank_state: Mapping[str, Any] | None = None

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: weights are loaded into sharded parameters on their device."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's live tensors, by name; nothing is copied or gathered."""
        return {} if self.lightning_module is None else self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Empty: :meth:`save_checkpoint` asks the optimizers themselves, shard by shard."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes one checkpoint folder, or defers it to the end of the accumulation window. All ranks together.

        Raises:
            CheckpointError: on all ranks, with the first cause; an older checkpoint of that name is intact.
        """
        if storage_options is not None:
            raise CheckpointError(
                f"storage_options={storage_options!r} has no use: checkpoints are folders on a file system that "
                "every rank sees; leave it None."
            )
        trainer = self._trainer()
        if internals.in_window(trainer) and not self._training_ended:
            weights_only = "optimizer_states" not in checkpoint
            rank_zero_info(f"Saving {filepath} is deferred to the end of the accumulation window.")
            self._deferred.append(lambda: trainer.save_checkpoint(filepath, weights_only))
            return
        self._write(checkpoint, filepath)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Deletes a checkpoint once every save that was asked for before is on disk."""
        if self._deferred:
            self._deferred.append(lambda: self.remove_checkpoint(filepath))
        elif self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(filepath)

    def run_deferred(self) -> None:
        """Carries out what was deferred; called at optimizer-step boundaries. All ranks together."""
        deferred, self._deferred = self._deferred, []
        for action in deferred:
            action()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a folder's trainer state; weights and optimizer state follow when they have a place to go.

        Args:
            checkpoint_path: a folder that :meth:`save_checkpoint` wrote.
            weights_only: Lightning's argument; our folders hold no pickle, so both values are safe.

        Raises:
            CheckpointError: not such a folder, or damaged.
        """
        get_backend().empty_cache()
        path = Path(checkpoint_path)
        if not folder.is_checkpoint(path):
            kind = (
                "a file"
                if path.is_file()
                else "a folder without a manifest"
                if path.exists()
                else "not there"
            )
            raise CheckpointError(
                f"{path} is not a checkpoint of this package ({kind}): pass the folder that contains manifest.json."
            )
        state = dict(folder.read_trainer_state(path))
        self._restored_from = path
        saved_layout = state.pop("layout", None)
        rank_state = folder.read_rank_state(path, self.global_rank) if saved_layout == _layout() else None
        self._rank_state = rank_state
        return {**state, "state_dict": {}}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads the folder's weights into this rank's shards, in place. All ranks together."""
        module = self.lightning_module
        if module is None or self._restored_from is None:
            raise CheckpointError("load_checkpoint must come before load_model_state_dict.")
        with show_transfer("Loading", self._restored_from) as progress:
            folder.load_module_state(
                self._restored_from,
                module.state_dict(),
                dict(module.named_parameters()),
                strict=strict,
                progress=progress,
            )
        for optimizer in self.optimizers:
            if hasattr(optimizer, "reload_master_weights"):
                optimizer.reload_master_weights()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads the folder's optimizer state into this rank's shards. All ranks together."""
        module = self.lightning_module
        if module is None or self._restored_from is None:
            raise CheckpointError("load_checkpoint must come before load_optimizer_state_dict.")
        with show_transfer("Loading optimizer state of", self._restored_from) as progress:
            folder.load_optimizer_state(
                self._restored_from, self._stateful(), dict(module.named_parameters()), progress=progress
            )

    def _write(self, checkpoint: dict[str, Any], filepath: Any) -> None:
        module = self.lightning_module
        if module is None:
            raise CheckpointError("there is no module to save: call trainer.fit(…) first.")
        trainer_state = {key: value for key, value in checkpoint.items() if key not in _IN_FOLDER}
        if "optimizer_states" in checkpoint:
            trainer_state["optimizer_states"] = []
        with show_transfer("Saving", filepath) as progress:
            folder.write_checkpoint(
                filepath,
                module_state=checkpoint["state_dict"],
                parameters=dict(module.named_parameters()),
                optimizers=self._stateful() if "optimizer_states" in checkpoint else (),
                trainer_state={**trainer_state, "layout": _layout()},
                rank_state=_random_states(),
                state_dict_type=self.state_dict_type,
                progress=progress,
            )
        self.last_saved = str(filepath)

    def _stateful(self) -> list[Any]:
        return [optimizer for optimizer in self.optimizers if hasattr(optimizer, "export_state")]

    def _restore_random_states(self) -> None:
        """Gives this rank its random states back, after everything that draws numbers while it is set up."""
        states, self._rank_state = self._rank_state, None
        if states is not None:
            _set_random_states(states)

    def _trainer(self) -> Any:
        if self.lightning_module is None:
            raise CheckpointError("the strategy is not connected to a module: call trainer.fit(…) first.")
        return self.lightning_module.trainer


def _layout() -> dict[str, int]:
    """What must be equal for a rank's random state to mean the same: the sizes of all axes."""
    return dict(mesh.current().sizes)


def _random_states() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": get_rng_state()}


def _set_random_states(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    set_rng_state(states["torch"])
