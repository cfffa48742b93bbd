"""The strategy's side of resuming: which checkpoint, and how a run gets back what is in it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
from lightning.pytorch.trainer.states import TrainerFn

from neuron_lightning.backends import get_backend
from neuron_lightning.checkpoint import folder
from neuron_lightning.errors import CheckpointError
from neuron_lightning.lightning import internals_loops, resume
from neuron_lightning.lightning.checkpoint_io import show_transfer
from neuron_lightning.lightning.strategy_checkpoint import CheckpointMixin, layout
from neuron_lightning.parallel.random import set_rng_state


class ResumeMixin(CheckpointMixin):
    """Choosing and loading of checkpoints."""

    _auto_resume: bool = False
    _restored_from: Path | None = None
    _verified: str | None = None
    """Path of a checkpoint whose files were all verified just now."""
    _rank_state: Mapping[str, Any] | None = None

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: weights are loaded into sharded parameters on their device."""
        return True

    def resolve_checkpoint(self, path: Any) -> Any:
        """The checkpoint that a run starts from, given what the user asked for. All ranks together.

        Args:
            path: ``fit(ckpt_path=…)``; ``"last"`` and ``"best"`` are looked up in the checkpoint callbacks' folders,
                None means the newest intact one there if the strategy was made with ``auto_resume=True``.
        """
        trainer = self._trainer()
        self.kept_for_user = self._verified = None
        if path == "last":
            return resume.last(trainer)
        if path == "best":
            return resume.best(trainer)
        if path is not None:
            self.kept_for_user = str(path)
        elif self._auto_resume and trainer.state.fn == TrainerFn.FITTING:
            path = self._verified = resume.newest_intact(trainer)
        return path

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
        if state.pop("step_done", False) and self._trainer().state.fn == TrainerFn.FITTING:
            internals_loops.keep_validation_done(self._trainer())
        if "loops" in state:
            internals_loops.rewind_unfinished_epoch(state["loops"]["fit_loop"])
        self._restored_from = path
        saved_layout = state.pop("layout", None)
        rank_state = folder.read_rank_state(path, self.global_rank) if saved_layout == layout() else None
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
                verify=self._verified != str(self._restored_from),
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
                self._restored_from,
                self._stateful(),
                dict(module.named_parameters()),
                verify=self._verified != str(self._restored_from),
                progress=progress,
            )

    def _restore_random_states(self) -> None:
        """Gives this rank its random states back, after everything that draws numbers while it is set up."""
        states, self._rank_state = self._rank_state, None
        if states is not None:
            random.setstate(states["python"])
            numpy.random.set_state(states["numpy"])
            set_rng_state(states["torch"])
