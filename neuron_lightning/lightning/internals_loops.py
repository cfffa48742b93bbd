"""The private parts of Lightning's training loops that boundaries and resuming need, each with its reason.

The second half of :mod:`internals`, under the same rules: checked against Lightning 2.6.6, pinned by
``tests/unit/test_internals.py``, replaced on the Trainer's own instances only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import RunningStage
from torch.optim.swa_utils import AveragedModel

_CHOICE = "_neuron_lightning_choice"


class Boundaries:
    """Tells when everything that belongs to an optimizer step is done.

    Reason: no public hook runs after a batch's metrics are logged, its validation has run and its schedulers
    have stepped; a checkpoint of any moment before lacks one of them. After the last batch of an epoch the
    epoch's own end belongs to it too, so there the boundary comes after that.

    Args:
        trainer: whose loops are extended.
        on_boundary: called with True where an epoch ended, on all ranks at the same steps.
    """

    def __init__(self, trainer: Trainer, on_boundary: Callable[[bool], None]) -> None:
        self.on_boundary = on_boundary
        self._stepped = False
        batch_loop, epoch_loop = trainer.fit_loop.epoch_loop, trainer.fit_loop
        end_batch, end_epoch = batch_loop.on_advance_end, epoch_loop.on_advance_end

        def batch_ended(data_fetcher: Any) -> None:
            end_batch(data_fetcher)
            if self._stepped and not batch_loop._num_ready_batches_reached():
                self._stepped = False
                self.on_boundary(False)

        def epoch_ended() -> None:
            end_epoch()
            if self._stepped:
                self._stepped = False
                self.on_boundary(True)

        batch_loop.on_advance_end = batch_ended  # type: ignore[method-assign]
        epoch_loop.on_advance_end = epoch_ended  # type: ignore[method-assign]

    def note_step(self) -> None:
        """The batch that is being trained on has ended in an optimizer step."""
        self._stepped = True


@contextmanager
def last_batch_uncounted(trainer: Trainer) -> Iterator[None]:
    """Inside, the loops look as they do in ``on_train_batch_end`` of the batch that has just ended.

    Reason: that is the one state inside an epoch from which Lightning resumes with the next batch in all cases;
    from the state after the batch it repeats part of its end (validation, plateau schedulers).
    """
    loop = trainer.fit_loop.epoch_loop
    progress: Any = loop.batch_progress
    progress.total.completed -= 1
    progress.current.completed -= 1
    loop._batches_that_stepped -= 1
    try:
        yield
    finally:
        progress.total.completed += 1
        progress.current.completed += 1
        loop._batches_that_stepped += 1


def in_window(trainer: Trainer) -> bool:
    """Whether the last batch left gradients that no optimizer step has used yet."""
    return trainer.state.stage == RunningStage.TRAINING and trainer.fit_loop.epoch_loop._should_accumulate()


def count_resumed_steps(trainer: Trainer) -> None:
    """Sets the loggers' step counter after a resume; with several optimizers Lightning's own count stays."""
    if len(trainer.strategy.optimizers) == 1:
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def between_epochs(trainer: Trainer) -> bool:
    """Whether a resumed fit goes on with the first batch of an epoch."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    whole = progress.ready == progress.started == progress.processed
    return bool(whole) or bool(batches.is_last_batch and batches.current.ready == batches.current.processed)


def completed_batches(trainer: Trainer) -> int:
    """Batches of the current epoch that a resumed fit must not train on again; 0 at the start of an epoch.

    A checkpoint written in ``on_train_batch_end`` holds a batch that is processed but not yet counted as
    completed; Lightning corrects that after the loaders exist, so it is anticipated here.
    """
    loop = trainer.fit_loop.epoch_loop
    if not trainer.fit_loop.restarting or between_epochs(trainer):
        return 0
    progress: Any = loop.batch_progress.current
    total: Any = loop.batch_progress.total
    uncounted = total.ready == total.started == total.processed == total.completed + 1
    return int(progress.completed) + int(uncounted)


def is_resuming(trainer: Trainer) -> bool:
    """Whether the fit that is being set up goes on from a checkpoint."""
    return bool(trainer.fit_loop.is_resuming)


def batches_trained(trainer: Trainer) -> int:
    """Batches of the current epoch that this run has trained on."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def begin_next_epoch(trainer: Trainer) -> None:
    """Makes a fit that was resumed from the end of an epoch start the next one as an uninterrupted fit does.

    Reason: with ``max_steps`` Lightning takes such a state for the middle of the epoch that is over, and trains
    on a batch too many; without, it has drawn the new epoch's order before the random states are back.
    """
    loop = trainer.fit_loop
    if not loop.is_resuming or not between_epochs(trainer):
        return
    progress: Any = loop.epoch_progress
    for count in (progress.current, progress.total):
        count.processed = count.started = count.ready
        count.completed = count.processed
    batches: Any = loop.epoch_loop.batch_progress.total
    batches.completed = batches.processed
    loop.epoch_loop.restarting = False
    loop.reset_restart_stage()
    loop.epoch_loop.reset_restart_stage()
    loop._restarting = loop._resuming_from_checkpoint = False


def rewind_unfinished_epoch(fit_loop: dict[str, Any]) -> None:
    """Lets the state of a fit that ended inside an epoch (``max_steps``, early stopping) go on inside it.

    Reason: Lightning counts an epoch that was left early as processed, so that a resumed fit with more steps would
    leave the rest of it out, or train on it as part of the next one.

    Args:
        fit_loop: ``state_dict()`` of the fit loop, from a checkpoint; changed in place.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    current, done = epochs["current"], batches["current"]
    left_early = not batches["is_last_batch"] and 0 < done["completed"] == done["processed"] == done["ready"]
    if left_early and current["ready"] == current["started"] == current["processed"]:
        for count in (epochs["current"], epochs["total"]):
            count["completed"] = count["processed"] = count["processed"] - 1


def keep_validation_done(trainer: Trainer) -> None:
    """Lets a fit that is resumed from a boundary leave the validation of that step alone.

    Reason: Lightning expects that a checkpoint of such a step was written before its validation; it winds the
    validation's counters forward and draws a random number for its loader.
    """
    loop: Any = trainer.fit_loop.epoch_loop.val_loop

    def nothing_left() -> None:
        """The validation was run, and counted, before the checkpoint was written."""
        del loop.increment_progress_to_evaluation_end

    loop.increment_progress_to_evaluation_end = nothing_left


def count_validations_again(trainer: Trainer) -> None:
    """Ends what :func:`keep_validation_done` began, once the first batch of the resumed fit is on its way."""
    vars(trainer.fit_loop.epoch_loop.val_loop).pop("increment_progress_to_evaluation_end", None)


def choose_checkpoint_late(trainer: Trainer, resolve: Callable[[Any], Any]) -> None:
    """Leaves it to ``resolve`` which checkpoint a run starts from, when the ranks can decide it together.

    Reason: Lightning looks for ``"last"`` by modification time, on every rank for itself, before the process group
    and the callbacks' folders exist, knows ``"best"`` only in the process that saved it, and has no hook for a run
    that should find its own checkpoint.
    """
    connector = trainer._checkpoint_connector
    if getattr(connector, _CHOICE, None) is not None:
        setattr(connector, _CHOICE, resolve)
        return
    setattr(connector, _CHOICE, resolve)
    parse, start = connector._parse_ckpt_path, connector.resume_start

    def parse_later(state_fn: Any, ckpt_path: Any, model_provided: bool, model_connected: bool) -> Any:
        if ckpt_path == "last" or (ckpt_path == "best" and not _known_best(trainer)):
            return ckpt_path
        return parse(state_fn, ckpt_path, model_provided=model_provided, model_connected=model_connected)

    def resume_start(checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        start(getattr(connector, _CHOICE)(checkpoint_path), weights_only)

    connector._parse_ckpt_path = parse_later  # type: ignore[method-assign]
    connector.resume_start = resume_start  # type: ignore[method-assign]


def _known_best(trainer: Trainer) -> bool:
    return bool(getattr(trainer.checkpoint_callback, "best_model_path", None))


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint of this moment would hold.

    Reason: the public way to it writes it, and a state that cannot be stored should be found before the first step.
    """
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def fetched_ahead(trainer: Trainer) -> int:
    """Batches that the training fetcher holds and has not handed out (it looks ahead where there is no length)."""
    return len(getattr(trainer.fit_loop._data_fetcher, "batches", ()))


def set_completed_batches(trainer: Trainer, count: int) -> None:
    """Restates the place in the epoch of a fit that is being resumed in batches of another size."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    progress.current.ready = progress.current.started = progress.current.processed = count
    uncounted = progress.total.processed - progress.total.completed
    progress.current.completed = count - uncounted


LOADER_STATES = "combined_loader"


def take_loader_states(loops: dict[str, Any]) -> list[Any]:
    """Removes and returns the states of stateful loaders from a checkpoint's loops.

    Reason: Lightning keeps rank 0's, but data-parallel ranks read different samples.
    """
    states: list[Any] = loops["fit_loop"]["state_dict"].pop(LOADER_STATES, [])
    return states


def put_loader_states(loops: dict[str, Any], states: list[Any]) -> None:
    """The way back, for this rank."""
    if states:
        loops["fit_loop"]["state_dict"][LOADER_STATES] = states


def renew_average(callback: Any, module: Any) -> None:
    """Makes an averaging callback's model anew from ``module``.

    Reason: it copies the module in ``setup``, before the strategy has sharded and drawn it.
    """
    if isinstance(callback, WeightAveraging):
        if callback._average_model is not None:
            device = callback._device or module.device
            callback._average_model = AveragedModel(
                model=module, device=device, use_buffers=callback._use_buffers, **callback._kwargs
            )
    elif callback._average_model is not None:
        callback._average_model = copy.deepcopy(module)


def start_averaging_again(callback: Any, trainer: Trainer) -> None:
    """Lets ``StochasticWeightAveraging`` go on in a resumed epoch with the learning rate of the checkpoint.

    Reason: it starts in ``on_train_epoch_start``, which a fit that is resumed inside an epoch does not reach, and its
    scheduler changes the learning rate when it is made.
    """
    if callback._scheduler_state is None or callback._initialized:
        return
    groups = trainer.optimizers[0].param_groups
    rates = [(group["lr"], group.get("initial_lr")) for group in groups]
    callback.on_train_epoch_start(trainer, trainer.lightning_module)
    for group, (rate, initial) in zip(groups, rates, strict=True):
        group["lr"] = rate
        if initial is not None:
            group["initial_lr"] = initial
