"""What happens at the end of an optimizer step: deferred saves, the checkpoint callbacks' saves, a stop for SIGTERM.

The ranks agree by one small all-reduce on the host (:class:`~neuron_lightning.lightning.votes.Votes`), so that all of
them save, stop or fail at the same step whichever of them had the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from neuron_lightning.backends import get_backend
from neuron_lightning.lightning import failures, internals, internals_loops
from neuron_lightning.lightning.callbacks.model_checkpoint import NeuronModelCheckpoint
from neuron_lightning.lightning.strategy_checkpoint import CheckpointMixin
from neuron_lightning.lightning.votes import Flag, Votes

_STOP = "stop"
_SAVE_FAILED = "save failed"
_TRIAL_STEPS = 10
_IN_FLIGHT_S = 20.0
"""After a failure of a rank: how long a save in flight may take to end."""


class BoundaryMixin(CheckpointMixin):
    """Boundaries of the strategy."""

    _votes: Votes
    _stop: Flag

    def _prepare_votes(self) -> None:
        self._votes, self._stop = Votes(), Flag()
        self._votes.ask(_STOP, self._stop)
        self._votes.ask(_SAVE_FAILED, lambda: self._saves.failed)

    def on_train_end(self) -> None:
        """Carries out saves that waited for the end of a window which never came."""
        self._training_ended = True
        self.run_deferred()
        for callback in _ours(self._trainer()):
            callback.finish(self._trainer())
        self._saves.wait()

    def on_exception(self, exception: BaseException) -> None:
        """Lets a save in flight end, and says how to go on after Ctrl-C or SIGTERM.

        Never runs a collective: peers may be gone.
        """
        self._deferred = []
        self._saves.wait_alone(_IN_FLIGHT_S)
        self._saves.look()
        if isinstance(exception, (KeyboardInterrupt, SystemExit)):
            failures.report_interrupt(self._trainer(), exception)

    def _on_boundary(self, epoch_ended: bool) -> None:
        trainer = self._trainer()
        if get_backend().is_trial:
            self._end_trial(trainer)
            return
        callbacks = _ours(trainer)
        for index, callback in enumerate(callbacks):
            self._votes.ask(f"time {index}", callback.is_time)
        wishes = self._votes.count()
        if _SAVE_FAILED in wishes:
            self._saves.wait()  # raises its cause
        self._saves.look()
        saved = trainer.checkpoint_callbacks and _STOP in wishes
        with (
            self._step_done(),
            nullcontext() if epoch_ended else internals_loops.last_batch_uncounted(trainer),
        ):
            self.run_deferred()
            for index, callback in enumerate(callbacks):
                callback.on_boundary(trainer, epoch_ended=epoch_ended, is_time=f"time {index}" in wishes)
            if _STOP in wishes:
                self._save_before_stop(trainer)
        if _STOP in wishes:
            self._saves.wait()
            if saved:
                rank_zero_info(f"SIGTERM: step {trainer.global_step} is saved as {self.last_saved}.")
            internals.stop_for_sigterm(trainer)

    def _end_trial(self, trainer: Any) -> None:
        """A trial run, which only collects graphs for the compiler, has met them all after a few steps."""
        if trainer.global_step >= _TRIAL_STEPS and not trainer.should_stop:
            trainer.should_stop = True
            rank_zero_info(
                f"Trial run for the compiler (neuron_parallel_compile): stopped after {trainer.global_step} steps; what it "
                "logged was not computed."
            )

    @contextmanager
    def _step_done(self) -> Iterator[None]:
        self._at_boundary = True
        try:
            yield
        finally:
            self._at_boundary = False

    def _save_before_stop(self, trainer: Any) -> None:
        """One checkpoint in the folder of the first checkpoint callback. All ranks together."""
        step = trainer.global_step
        callback = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        if callback is None:
            rank_zero_warn(
                f"SIGTERM at step {step}: nothing is saved, because there is no checkpoint callback that says where; "
                "add NeuronModelCheckpoint(dirpath=…) to the Trainer's callbacks."
            )
        elif isinstance(callback, NeuronModelCheckpoint):
            callback.save_now(trainer)
        elif self._last_saved_step != step:
            path = callback.format_checkpoint_name({"epoch": trainer.current_epoch, "step": step})
            trainer.save_checkpoint(self.broadcast(path), callback.save_weights_only)


def _ours(trainer: Any) -> list[NeuronModelCheckpoint]:
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, NeuronModelCheckpoint)]
