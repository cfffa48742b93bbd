"""Every private part of Lightning that this package touches, in one file, each with its reason.

Checked against Lightning 2.6.6; ``tests/unit/test_internals.py`` pins the names and signatures, so that a new
Lightning that moves them fails there and not in somebody's training run. All replacements are made on the
Trainer's own instances, never on Lightning's classes.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from neuron_lightning.backends import get_backend
from neuron_lightning.errors import ConfigError
from neuron_lightning.lightning.internals_loops import Boundaries
from neuron_lightning.lightning.internals_recorded import fetched, reset_to_data, results_on_host

CHECKED_AGAINST = "2.6.6"
SHARDED_LOADER = "_neuron_lightning_sharded"
"""Attribute of a DataLoader that already yields only its data-parallel rank's samples."""

_INSTALLED = "_neuron_lightning_internals"
_ENTRY_POINTS = ("fit", "validate", "test", "predict")


@dataclass(frozen=True, kw_only=True)
class TrainerArguments:
    """What the user gave to the Trainer that is being built."""

    devices: Any
    num_nodes: int
    accelerator: str | Accelerator
    environment_given: bool
    trainer: Trainer | None


def trainer_arguments() -> TrainerArguments | None:
    """The arguments of the Trainer under construction, or None outside of one.

    Reason: by the time a strategy hears of them, ``devices="auto"`` has become 1 on the CPU and can no longer
    be told from ``devices=1``; the guide's Trainer gives neither and must follow torchrun. They are read from
    the frame of ``_AcceleratorConnector.__init__``; if that is not found, the answer is None.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _AcceleratorConnector.__init__.__code__:
        frame = frame.f_back
    if frame is None:
        return None
    given, caller = frame.f_locals, frame.f_back
    trainer = caller.f_locals.get("self") if caller is not None else None
    return TrainerArguments(
        devices=given.get("devices", "auto"),
        num_nodes=given.get("num_nodes", 1),
        accelerator=given.get("accelerator", "auto"),
        environment_given=getattr(given.get("self"), "_cluster_environment_flag", None) is not None,
        trainer=trainer if isinstance(trainer, Trainer) else None,
    )


def script_launcher(environment: ClusterEnvironment, num_processes: int, num_nodes: int) -> Any:
    """Lightning's launcher that runs the script again for every further rank (private class, no public one)."""
    return _SubprocessScriptLauncher(environment, num_processes, num_nodes)


def before_entry(trainer: Trainer, prepare: Callable[[], None]) -> None:
    """Makes the Trainer's entry points explain a module of the other package, and calls ``prepare`` first.

    Reason: ``lightning`` and ``pytorch_lightning`` define different classes of the same names, and the
    Trainer's own check (before any strategy call) only says that the model is not a LightningModule. Before
    any strategy call, too, it chooses the checkpoint to start from.

    Args:
        trainer: under construction.
        prepare: called at the start of ``fit``, ``validate``, ``test`` and ``predict``.
    """
    for name in _ENTRY_POINTS:
        original = getattr(trainer, name)

        @functools.wraps(original)
        def entry(model: Any = None, *args: Any, _call: Callable[..., Any] = original, **kwargs: Any) -> Any:
            check_package(model)
            prepare()
            return _call(model, *args, **kwargs)

        setattr(trainer, name, entry)


def check_package(model: object) -> None:
    """Raises :class:`ConfigError` for a ``pytorch_lightning`` module."""
    foreign = "pytorch_lightning"
    if not isinstance(model, LightningModule) and any(
        base.__module__.split(".")[0] == foreign for base in type(model).__mro__
    ):
        raise ConfigError(
            f"{type(model).__qualname__} derives from {foreign}.LightningModule, but this Trainer is lightning's: "
            "the two packages define different classes. Replace `import pytorch_lightning as pl` by "
            "`import lightning.pytorch as pl` in the module's file."
        )


@dataclass(kw_only=True)
class Hooks:
    """What the strategy wants to be told, and the state that the replaced methods share."""

    on_boundary: Callable[[bool], None]
    """Called when everything that belongs to an optimizer step is done; True where an epoch ended with it."""
    on_sigterm: Callable[[], None]
    """Called in the signal handler: sets a flag and nothing else."""
    step_before_batch: int | None = None


def install(trainer: Trainer, hooks: Hooks) -> None:
    """Makes the replacements on ``trainer``, once; later calls only renew the hooks."""
    present: Hooks | None = getattr(trainer, _INSTALLED, None)
    if present is not None:
        present.on_boundary, present.on_sigterm = hooks.on_boundary, hooks.on_sigterm
        return
    setattr(trainer, _INSTALLED, hooks)
    boundaries = Boundaries(trainer, lambda epoch_ended: hooks.on_boundary(epoch_ended))
    _replace_sigterm(trainer, hooks)
    _replace_accumulation(trainer, hooks)
    _replace_logging(trainer, boundaries)
    reset_to_data(trainer)
    _replace_sampler_rule(trainer)


def _replace_sigterm(trainer: Trainer, hooks: Hooks) -> None:
    """SIGTERM only sets a flag; ranks agree on it at optimizer-step boundaries.

    Reason: Lightning broadcasts rank 0's flag before every batch and reads it with ``.item()``: one device
    synchronisation per micro-batch, and a SIGTERM to another rank is lost; its handler runs a collective
    inside the signal handler.
    """

    def notifier(signum: Any, frame: FrameType | None) -> None:
        launcher = trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signum)
        if trainer.state.fn != TrainerFn.FITTING:
            raise SIGTERMException
        hooks.on_sigterm()

    def broadcast() -> None:
        """Nothing to do before a batch: see ``on_boundary``."""

    trainer._signal_connector._sigterm_notifier_fn = notifier  # type: ignore[assignment, method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = broadcast  # type: ignore[method-assign]


def stop_for_sigterm(trainer: Trainer) -> None:
    """Ends training on this rank as Lightning does for SIGTERM; all ranks call it at the same step."""
    trainer._signal_connector.received_sigterm = True
    raise SIGTERMException


def _replace_accumulation(trainer: Trainer, hooks: Hooks) -> None:
    """Under manual optimization a batch without an optimizer step counts as accumulation.

    Reason: Lightning only knows ``accumulate_grad_batches``, which manual optimization refuses: it counts every
    micro-batch as a step for loggers and clears gradients before a validation inside a window.
    """
    loop = trainer.fit_loop.epoch_loop
    should_accumulate, run = loop._should_accumulate, loop.manual_optimization.run

    def manual_run(kwargs: Any) -> Any:
        hooks.step_before_batch = trainer.global_step
        return run(kwargs)

    def replaced() -> bool:
        module = trainer.lightning_module
        if module is None or module.automatic_optimization or hooks.step_before_batch is None:
            return should_accumulate()
        return trainer.global_step == hooks.step_before_batch

    loop.manual_optimization.run = manual_run  # type: ignore[method-assign]
    loop._should_accumulate = replaced  # type: ignore[method-assign]


def _replace_logging(trainer: Trainer, boundaries: Boundaries) -> None:
    """One record per optimizer step, at ``trainer.global_step``.

    Reason: Lightning numbers records by batches (0, 1, 2, … before the step is counted) and writes one per
    micro-batch under manual optimization.
    """
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    log_metrics, update = connector.log_metrics, connector.update_train_step_metrics

    def log_at_global_step(metrics: Any, step: int | None = None) -> None:
        counted, loop._batches_that_stepped = loop._batches_that_stepped, trainer.global_step
        try:
            log_metrics(fetched(metrics), step)
        finally:
            loop._batches_that_stepped = counted

    def update_at_boundary() -> None:
        get_backend().mark_step()  # with the batch's logging, before anything is read
        if loop._should_accumulate():
            return
        update()
        boundaries.note_step()

    connector.log_metrics = log_at_global_step  # type: ignore[method-assign]
    connector.update_train_step_metrics = update_at_boundary  # type: ignore[method-assign]
    connector.__class__ = _QuietLoggerConnector


class _QuietLoggerConnector(_LoggerConnector):
    """Reads progress-bar metrics from the device when a bar asks for them, and at the end of an epoch.

    Reason: Lightning converts them to Python numbers on every batch, and again whenever a callback looks at
    ``callback_metrics``: each is a device synchronisation. They are properties, so the instance changes class.
    """

    @property
    def metrics(self) -> Any:
        """Metrics of the batch (in training without those of the bar) or of the epoch."""
        in_epoch = self._first_loop_iter is not None
        if not in_epoch or self.trainer.state.stage != RunningStage.TRAINING:
            with results_on_host(self.trainer, on_step=in_epoch):
                return super().metrics
        with _bar_metrics_unread(self.trainer):
            return super().metrics

    @property
    def progress_bar_metrics(self) -> Any:
        """Python numbers for a bar; reads the device."""
        if self.trainer._results:
            with results_on_host(self.trainer, on_step=self._first_loop_iter is not None):
                self._progress_bar_metrics.update(super().metrics["pbar"])
        return self._progress_bar_metrics

    @property
    def callback_metrics(self) -> Any:
        """What callbacks monitor; on the host where reading each by itself would cost a graph."""
        return fetched(super().callback_metrics)

    @property
    def logged_metrics(self) -> Any:
        """As :attr:`callback_metrics`."""
        return fetched(super().logged_metrics)

    def epoch_end_reached(self) -> None:
        """Keeps what the bar showed of single batches, which the epoch's results do not hold."""
        _ = self.progress_bar_metrics
        super().epoch_end_reached()


@contextmanager
def _bar_metrics_unread(trainer: Trainer) -> Iterator[None]:
    results = trainer._results
    metas = [metric.meta for metric in (results or {}).values() if metric.meta.prog_bar]
    for meta in metas:
        meta.prog_bar = False
    try:
        yield
    finally:
        for meta in metas:
            meta.prog_bar = True


def _replace_sampler_rule(trainer: Trainer) -> None:
    """Loaders marked :data:`SHARDED_LOADER` get no distributed sampler.

    Reason: Lightning looks at ``loader.sampler`` only, and wraps silently a loader that is already cut by rank
    in another way (a batch sampler, a dataset): each rank then sees a part of its part.
    """
    data = trainer._data_connector
    requires = data._requires_distributed_sampler

    def replaced(dataloader: Any) -> bool:
        return not getattr(dataloader, SHARDED_LOADER, False) and requires(dataloader)

    data._requires_distributed_sampler = replaced  # type: ignore[method-assign]


def signature_of(function: Callable[..., Any]) -> list[str]:
    """Parameter names, for the test that pins Lightning's signatures."""
    return list(inspect.signature(function).parameters)
