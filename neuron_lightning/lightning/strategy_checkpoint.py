"""The strategy's side of checkpoints: what is saved when, and how a run gets it back.

A checkpoint is a folder that :mod:`neuron_lightning.checkpoint` writes and reads on all ranks together. Saves
happen at optimizer-step boundaries only, because gradients of an unfinished accumulation window are in no
checkpoint: a trigger inside a window is carried out at its end, and deletions wait for the saves before them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from neuron_lightning.backends import get_backend
from neuron_lightning.checkpoint import check_trainer_state, exchange
from neuron_lightning.checkpoint.host_copies import fetched
from neuron_lightning.errors import CheckpointError
from neuron_lightning.lightning import averages, internals_loops
from neuron_lightning.lightning.finite import check_finite
from neuron_lightning.lightning.saving import Saves
from neuron_lightning.lightning.strategy_data import DataMixin
from neuron_lightning.parallel import mesh
from neuron_lightning.parallel.random import get_rng_state

_IN_FOLDER = ("state_dict", "optimizer_states")


class CheckpointMixin(DataMixin):
    """Saving, loading and removing of the strategy."""

    state_dict_type: str
    _deferred: list[Callable[[], None]]
    _saves: Saves
    last_saved: str | None = None
    """Path of the last checkpoint that this strategy wrote and committed."""
    kept_for_user: str | None = None
    """Path that the user named to resume from: no callback deletes it."""
    _last_saved_step: int | None = None
    _training_ended: bool = False
    _at_boundary: bool = False
    """Whether everything that belongs to the step is done: its validation above all."""

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
        if get_backend().is_trial:
            rank_zero_info(f"A trial run for the compiler computes nothing: {filepath} is not saved.")
            return
        trainer = self._trainer()
        if internals_loops.in_window(trainer) and not self._training_ended:
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
            self._saves.then(lambda: self.checkpoint_io.remove_checkpoint(filepath))

    def after_commit(self, everywhere: Callable[[], None], *, on_rank_zero: Callable[[], None]) -> None:
        """Runs both once the save that was asked for last is committed; not at all if it fails.

        Args:
            everywhere: on every rank, by the thread that trains.
            on_rank_zero: on rank 0, right after the commit.
        """
        if self.is_global_zero:
            self._saves.then(on_rank_zero)
        self._saves.later(everywhere)

    def run_deferred(self) -> None:
        """Carries out what was deferred; called at optimizer-step boundaries. All ranks together."""
        deferred, self._deferred = self._deferred, []
        for action in deferred:
            action()

    def _write(self, checkpoint: dict[str, Any], filepath: Any) -> None:
        module = self.lightning_module
        if module is None:
            raise CheckpointError("there is no module to save: call trainer.fit(…) first.")
        averaged: Mapping[str, Any] = averages.take(checkpoint, module)
        trainer_state = {key: value for key, value in checkpoint.items() if key not in _IN_FOLDER}
        loaders = internals_loops.take_loader_states(checkpoint["loops"]) if "loops" in checkpoint else []
        if "optimizer_states" in checkpoint:
            trainer_state["optimizer_states"] = []
        optimizers: Sequence[Any] = self._stateful() if "optimizer_states" in checkpoint else []
        parameters = dict(module.named_parameters())
        state, optimizers, averaged = fetched(checkpoint["state_dict"], optimizers, averaged)
        check_finite(filepath, state, parameters, optimizers, checkpoint.get("global_step"))
        fitting = self._trainer().state.fn == TrainerFn.FITTING
        self._saves.write(
            filepath,
            background=fitting and not self._training_ended,
            module_state=state,
            parameters=parameters,
            optimizers=optimizers,
            averages=averaged,
            trainer_state={**trainer_state, **self._noted()},
            rank_state={**_random_states(), **self.data_state(), "loaders": loaders},
            state_dict_type=self.state_dict_type,
        )
        self._last_saved_step = checkpoint.get("global_step")
        self._saves.later(lambda: setattr(self, "last_saved", str(filepath)))

    def _noted(self) -> dict[str, Any]:
        """What the strategy itself needs to know of a checkpoint when a run goes on from it."""
        trainer = self._trainer()
        return {
            "layout": layout(),
            "step_done": self._at_boundary,
            "facts": self._facts,
            "data_position": {
                "epoch": trainer.current_epoch,
                "batches": internals_loops.batches_trained(trainer),
                "batch": self._batch_samples,
            },
        }

    def check_storable(self) -> None:
        """Checks that what checkpoints will hold besides tensors can be stored. All ranks together.

        Raises:
            CheckpointError: on all ranks, naming callback and key.
        """
        trainer = self._trainer()
        if not trainer.checkpoint_callbacks:
            return
        exchange.together("store the state of the run", lambda: check_trainer_state(_storable(trainer)))

    def _stateful(self) -> list[Any]:
        return [optimizer for optimizer in self.optimizers if hasattr(optimizer, "export_state")]

    def _trainer(self) -> Any:
        if self.lightning_module is None:
            raise CheckpointError("the strategy is not connected to a module: call trainer.fit(…) first.")
        return self.lightning_module.trainer


def _storable(trainer: Any) -> dict[str, Any]:
    state = internals_loops.dump_checkpoint(trainer)
    averages.take(state, trainer.lightning_module)
    return {key: value for key, value in state.items() if key not in _IN_FOLDER}


def layout() -> dict[str, int]:
    """What must be equal for a rank's random state to mean the same: the sizes of all axes."""
    return dict(mesh.current().sizes)


def _random_states() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": get_rng_state()}
