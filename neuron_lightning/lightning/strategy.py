"""The strategy: Lightning's Trainer on tensor-parallel, data-parallel, ZeRO-1 ranks."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from neuron_lightning.backends import get_backend
from neuron_lightning.config import AsyncSave, NeuronConfig
from neuron_lightning.errors import ConfigError, ParallelStateError
from neuron_lightning.lightning import (
    drift,
    failures,
    internals,
    internals_loops,
    internals_recorded,
    processes,
    resume,
)
from neuron_lightning.lightning.averages import average_prepared_module
from neuron_lightning.lightning.callbacks.recompile_guard import guard_against_recompiles
from neuron_lightning.lightning.checkpoint_io import NeuronCheckpointIO
from neuron_lightning.lightning.folder_lock import FolderLocks
from neuron_lightning.lightning.model_setup import prepare_module, report_layout
from neuron_lightning.lightning.precision import NeuronXLAPrecisionPlugin
from neuron_lightning.lightning.saving import Saves
from neuron_lightning.lightning.settings import StrategySettings
from neuron_lightning.lightning.strategy_boundary import BoundaryMixin
from neuron_lightning.lightning.strategy_collectives import CollectivesMixin
from neuron_lightning.lightning.strategy_data import vocab_size_of
from neuron_lightning.lightning.strategy_processes import ProcessesMixin
from neuron_lightning.lightning.strategy_resume import ResumeMixin
from neuron_lightning.optim import wrap_optimizer
from neuron_lightning.parallel import mesh
from neuron_lightning.parallel.initialize import deferred_init
from neuron_lightning.parallel.move import move_module

_log = logging.getLogger(__name__)


class _Active:
    """The one holder of the strategy that is between set-up and tear-down in this process."""

    strategy: weakref.ref[NeuronXLAStrategy] | None = None


class NeuronXLAStrategy(ProcessesMixin, BoundaryMixin, ResumeMixin, CollectivesMixin):
    """Runs the Trainer on ranks laid out as tensor-parallel × data-parallel, on neuron, cuda or cpu.

    Any ``LightningModule`` trains under it, with automatic or manual optimization. Its optimizers are replaced
    by :class:`~neuron_lightning.optim.ParallelOptimizer`, which reduces gradients once per optimizer step.

    Args:
        nxd_config: what :func:`~neuron_lightning.neuronx_distributed_config` returns, or a dict with its keys.
        tensor_parallel_size: ranks that share one copy of the weights (1: as ``nxd_config`` says).
        pipeline_parallel_size: 1 in this release.
        expert_parallel_size: 1 in this release.
        context_parallel_size: 1 in this release.
        debug: every rank logs its place in the layout.
        sync_module_states: start from rank 0's weights even where every rank would draw the same.
        checkpoint_io: plugin that removes checkpoints; default :class:`~neuron_lightning.NeuronCheckpointIO`.
        save_load_xser: accepted for NxD's scripts; checkpoints are always one folder of safetensors files.
        zero1: cut optimizer state over the data-parallel ranks; None: as ``nxd_config`` says.
        sequence_parallel: cut activations along the sequence between parallel layers; None: as ``nxd_config``.
        tp_plan: module-name pattern -> ``"column"``, ``"row"``, …, applied after ``configure_model`` (see
            :func:`neuron_lightning.parallel.parallelize`); a plan that was already applied wins.
        layout: must be None in this release.
        state_dict_type: ``"deduped"`` (each element is written once) or ``"sharded"``.
        auto_resume: a fit without ``ckpt_path`` goes on from the newest intact checkpoint in the folder of the
            checkpoint callbacks, and starts fresh where there is none.
        async_save: write checkpoints in the background, while training goes on; True, or
            :class:`~neuron_lightning.config.AsyncSave` with a memory budget.
        resume_override: settings in which a resumed run may differ from the one that wrote its checkpoint, such as
            ``["lr", "hparams.dropout"]``; the values of the resumed run count.
        compile: must be False in this release.
        timeout: of collectives; a rank that waits longer fails.

    Attributes:
        data_parallel_rank, data_parallel_size, tensor_parallel_rank, tensor_parallel_size,
        pipeline_parallel_rank, pipeline_parallel_size: this rank's place; known once the Trainer runs.

    Raises:
        ConfigError: an argument contradicts ``nxd_config``, or asks for what this release lacks.
    """

    strategy_name = "neuron"

    def __init__(
        self,
        nxd_config: Mapping[str, Any] | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        context_parallel_size: int = 1,
        debug: bool = False,
        sync_module_states: bool = False,
        checkpoint_io: CheckpointIO | None = None,
        save_load_xser: bool = True,
        *,
        zero1: bool | None = None,
        sequence_parallel: bool | None = None,
        tp_plan: Mapping[str, str] | None = None,
        layout: None = None,
        state_dict_type: Literal["deduped", "sharded"] = "deduped",
        auto_resume: bool = False,
        async_save: bool | AsyncSave = False,
        resume_override: Sequence[str] = (),
        compile: bool = False,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        self.settings = StrategySettings.resolve(
            nxd_config=nxd_config,
            sizes={
                "tensor_parallel_size": tensor_parallel_size,
                "pipeline_parallel_size": pipeline_parallel_size,
                "expert_parallel_size": expert_parallel_size,
                "context_parallel_size": context_parallel_size,
            },
            zero1=zero1,
            sequence_parallel=sequence_parallel,
            tp_plan=tp_plan,
            state_dict_type=state_dict_type,
            sync_module_states=sync_module_states,
            later={"layout": layout, "compile": compile},
        )
        self.state_dict_type = state_dict_type
        self._debug = debug
        self._timeout = timeout
        self._deferred = []
        self._auto_resume = auto_resume
        self._async_save = AsyncSave.from_any(async_save)
        self._override, self._overridden, self._facts = drift.check_override(resume_override), set(), {}
        self._saves = Saves(self._async_save)
        self._locks = FolderLocks()
        self._prepare_votes()
        super().__init__(checkpoint_io=checkpoint_io)

    @property
    def nxd_config(self) -> NeuronConfig:
        """The configuration in force, every argument of the strategy merged in."""
        return self.settings.config

    # -- set-up ----------------------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Precision:
        """Always ours; what ``Trainer(precision=…)`` made is converted to the same name."""
        if self._precision_plugin is None:
            return NeuronXLAPrecisionPlugin()
        return self._precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        if precision_plugin is not None:
            precision_plugin = NeuronXLAPrecisionPlugin.from_lightning(precision_plugin)
        self._precision_plugin = precision_plugin

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """The plugin that removes checkpoints."""
        if self._checkpoint_io is None:
            self._checkpoint_io = NeuronCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    def connect(self, model: LightningModule) -> None:
        """Takes the module. Raises :class:`ConfigError` for one of the ``pytorch_lightning`` package."""
        internals.check_package(model)
        if self._auto_resume and model.trainer.state.fn == TrainerFn.FITTING:
            resume.check_folders(model.trainer)
        super().connect(model)

    def setup_environment(self) -> None:
        """Creates the process group and the mesh, and checks that all ranks mean the same run.

        Raises:
            ConfigError: the ranks disagree; every rank raises it, naming key, values and ranks.
            ParallelStateError: another strategy is running in this process.
        """
        self._claim_process()
        plugin = self.precision_plugin
        if isinstance(plugin, NeuronXLAPrecisionPlugin):
            plugin.check(get_backend())
        super().setup_environment()
        reset_seed()
        self.set_world_ranks()
        processes.init_process_group(self, self._timeout)
        trainer = self._trainer()
        failures.watch(partial(failures.how_to_go_on, trainer))
        said = {
            **self.settings.flat(),
            "auto_resume": repr(self._auto_resume),
            "async_save": repr(self._async_save),
        }
        processes.check_equal_settings(said, trainer, str(plugin.precision))
        processes.build_mesh(tp=self.settings.tp, sequence_parallel=self.settings.sequence_parallel)
        internals_loops.choose_checkpoint_late(trainer, self.resolve_checkpoint)
        internals.install(
            trainer, internals.Hooks(on_boundary=self._on_boundary, on_sigterm=self._stop.set_here)
        )
        if self._debug:
            _log.warning("rank %d of %s", mesh.current().rank, mesh.describe(mesh.current()))

    def _extend_entries(self, trainer: Trainer) -> None:
        choose = partial(internals_loops.choose_checkpoint_late, trainer, self.resolve_checkpoint)
        internals.before_entry(trainer, choose)

    def _claim_process(self) -> None:
        other = _Active.strategy() if _Active.strategy is not None else None
        if other is not None and other is not self:
            raise ParallelStateError(
                "another NeuronXLAStrategy is running in this process: a process holds one parallel layout at a "
                "time; let its Trainer finish (or fail) before the next one starts."
            )
        _Active.strategy = weakref.ref(self)

    def setup(self, trainer: Trainer) -> None:
        """Parallelises, draws, synchronises and moves the module, then builds the optimizers. All ranks together."""
        module, accelerator = self.lightning_module, self.accelerator
        if module is None or accelerator is None:
            raise ConfigError(
                "setup needs a connected module and an accelerator: use the strategy through a Trainer."
            )
        accelerator.setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING and not getattr(trainer, "fast_dev_run", False):
            self._locks.acquire(resume.folders(trainer))
        self.precision_plugin.convert_module(module)
        prepare_module(module, self.settings, self.root_device)
        internals_recorded.keep_numbers_on_host(module)
        self._vocab_size = vocab_size_of(module)
        report_layout(module, self.settings, str(self.precision_plugin.precision), self.root_device)
        if trainer.state.fn == TrainerFn.FITTING:
            guard_against_recompiles(trainer, module)
            self._saves.open()
            average_prepared_module(trainer, module)
            self.setup_optimizers(trainer)
            self._placed, self._positions, self._position, self._saved_batch = [], (), {}, None
            self._facts = drift.facts(trainer, self._vocab_size)
        self.setup_precision_plugin()

    def model_to_device(self) -> None:
        """Moves the module to this rank's device."""
        if self.model is not None:
            move_module(self.model, self.root_device)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Calls ``configure_optimizers`` and puts a ParallelOptimizer around each optimizer that is none."""
        super().setup_optimizers(trainer)
        self.optimizers = [self._wrapped(optimizer) for optimizer in self.optimizers]

    def _wrapped(self, optimizer: Optimizer) -> Optimizer:
        if hasattr(optimizer, "synchronize") or not optimizer.param_groups:
            return optimizer
        settings = self.settings
        return wrap_optimizer(
            optimizer,
            zero1=settings.zero1,
            max_grad_norm=settings.max_grad_norm,
            master_weights=settings.master_weights,
            fp32_grad_accumulation=settings.fp32_grad_accumulation,
        )

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """``configure_model`` runs in it: parallel layers draw their weights later, alike in every layout."""
        with deferred_init():
            yield

    # -- while it runs ---------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Gives a resumed run its random states back."""
        get_backend().mark_step()  # weights and state are made; the first step's graph does not make them
        self._training_ended, self._steps_counted = False, False
        internals_loops.begin_next_epoch(self._trainer())
        self._apply_overrides()
        for callback in self._trainer().callbacks:
            if isinstance(callback, StochasticWeightAveraging):
                internals_loops.start_averaging_again(callback, self._trainer())
        self.check_storable()
        self._restore_random_states()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Gives a resumed run its step count back, once Lightning's epoch loop has restarted its own."""
        if not self._steps_counted:
            internals_loops.count_resumed_steps(self._trainer())
            internals_loops.count_validations_again(self._trainer())
            self._steps_counted = True

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's; every batch is a graph of its own where graphs are recorded. So are those below."""
        return _ended(super().validation_step(*args, **kwargs))

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`validation_step`."""
        return _ended(super().test_step(*args, **kwargs))

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`validation_step`."""
        return _ended(super().predict_step(*args, **kwargs))

    def teardown(self) -> None:
        """Moves the module to the CPU and lets the next strategy start. The layout stays until then."""
        self._saves.close()
        failures.stop_watching()
        if self.lightning_module is not None:
            failing = sys.exc_info()[1] is not None
            try:
                move_module(self.lightning_module, torch.device("cpu"))
            except RuntimeError:
                if not failing:
                    raise
                # The traceback of what is being reported holds a graph, and that the parameters. They stay.
        if self.accelerator is not None:
            self.accelerator.teardown()
        if self.cluster_environment is not None:
            self.cluster_environment.teardown()
        if self._checkpoint_io is not None:
            self._checkpoint_io.teardown()
        self._locks.release()
        _Active.strategy = None


def _ended(outputs: Any) -> Any:
    """Ends the graph of a batch outside of training: nothing else would before all batches are recorded."""
    get_backend().mark_step()
    return outputs
