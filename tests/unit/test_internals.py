"""Pins every private part of Lightning that the package relies on; a new Lightning fails here first."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.manual import _ManualOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from lightning.pytorch.trainer.connectors.data_connector import _DataConnector
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from neuron_lightning.errors import ConfigError
from neuron_lightning.lightning import internals

SIGNATURES = [
    (_TrainingEpochLoop._broadcast_sigterm_tensor, ["self"]),
    (_TrainingEpochLoop._should_accumulate, ["self"]),
    (_ManualOptimization.run, ["self", "kwargs"]),
    (_SignalConnector._sigterm_notifier_fn, ["self", "signum", "_"]),
    (_LoggerConnector.log_metrics, ["self", "metrics", "step"]),
    (_LoggerConnector.update_train_step_metrics, ["self"]),
    (_LoggerConnector.metrics.fget, ["self"]),
    (_LoggerConnector.progress_bar_metrics.fget, ["self"]),
    (_LoggerConnector.callback_metrics.fget, ["self"]),
    (_LoggerConnector.logged_metrics.fget, ["self"]),
    (_LoggerConnector.epoch_end_reached, ["self"]),
    (_DataConnector._requires_distributed_sampler, ["self", "dataloader"]),
    (_SubprocessScriptLauncher.__init__, ["self", "cluster_environment", "num_processes", "num_nodes"]),
    (_TrainingEpochLoop.on_advance_end, ["self", "data_fetcher"]),
    (_TrainingEpochLoop._num_ready_batches_reached, ["self"]),
    (_FitLoop.on_advance_end, ["self"]),
    (ModelCheckpoint._should_skip_saving_checkpoint, ["self", "trainer"]),
    (ModelCheckpoint._should_save_on_train_epoch_end, ["self", "trainer"]),
    (ModelCheckpoint._monitor_candidates, ["self", "trainer"]),
    (ModelCheckpoint._find_last_checkpoints, ["self", "trainer"]),
    (Precision._after_closure, ["self", "model", "optimizer"]),
    (
        Precision._clip_gradients,
        ["self", "model", "optimizer", "clip_val", "gradient_clip_algorithm"],
    ),
    (torch.amp.GradScaler._unscale_grads_, ["self", "optimizer", "inv_scale", "found_inf", "allow_fp16"]),
]


@pytest.mark.parametrize(("function", "names"), SIGNATURES, ids=lambda v: getattr(v, "__qualname__", ""))
def test_signature(function, names):
    assert internals.signature_of(function) == names


def test_the_lightning_that_was_checked_is_the_one_installed():
    assert lightning.__version__ == internals.CHECKED_AGAINST


def test_connector_init_has_the_arguments_that_are_read():
    names = internals.signature_of(_AcceleratorConnector.__init__)
    assert {"devices", "num_nodes", "accelerator"} <= set(names)


def test_private_parts_exist_on_a_trainer():
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    loop = trainer.fit_loop.epoch_loop
    for owner, name in [
        (loop, "_batches_that_stepped"),
        (loop, "manual_optimization"),
        (loop, "batch_progress"),
        (loop, "_restart_stage"),
        (trainer.fit_loop, "epoch_progress"),
        (trainer.fit_loop, "_restart_stage"),
        (trainer.fit_loop, "_resuming_from_checkpoint"),
        (trainer.fit_loop, "_restarting"),
        (trainer, "_logger_connector"),
        (trainer, "_signal_connector"),
        (trainer, "_data_connector"),
        (trainer._logger_connector, "should_update_logs"),
        (trainer._logger_connector, "_first_loop_iter"),
        (trainer._logger_connector, "_progress_bar_metrics"),
        (trainer._accelerator_connector, "_cluster_environment_flag"),
    ]:
        assert hasattr(owner, name), name
    assert trainer._signal_connector.received_sigterm is False


def test_arguments_are_none_outside_of_a_trainer():
    assert internals.trainer_arguments() is None


def test_arguments_are_read_as_given():
    seen = []

    class Probe(lightning.pytorch.strategies.SingleDeviceStrategy):
        def set_world_ranks(self):
            seen.append(internals.trainer_arguments())

    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    Trainer(strategy=Probe(torch.device("cpu")), devices=1, **options)
    trainer = Trainer(strategy=Probe(torch.device("cpu")), **options)
    assert [one.devices for one in seen] == [1, "auto"]
    assert seen[1].accelerator == "cpu"
    assert seen[1].trainer is trainer
    assert not seen[1].environment_given


def test_a_pytorch_lightning_module_is_explained():
    pytorch_lightning = pytest.importorskip("pytorch_" + "lightning")

    class Foreign(pytorch_lightning.LightningModule):
        """Of the other package."""

    with pytest.raises(
        ConfigError, match=r"Foreign derives from pytorch_lightning.*import lightning\.pytorch"
    ):
        internals.check_package(Foreign())
    trainer = Trainer(strategy="neuron", accelerator="cpu", logger=False, enable_checkpointing=False)
    for entry in (trainer.fit, trainer.validate, trainer.test, trainer.predict):
        with pytest.raises(ConfigError, match="the two packages define different classes"):
            entry(Foreign())
    internals.check_package(LightningModule())


def test_no_other_file_touches_privates():
    """A leading underscore after a name that is Lightning's belongs into internals.py."""
    folder = Path(internals.__file__).parent
    allowed = {"internals.py", "internals_loops.py"}
    words = (
        "_logger_connector",
        "_signal_connector",
        "_data_connector",
        "_accelerator_connector",
        "epoch_loop._",
    )
    offenders = [
        f"{path.name}: {word}"
        for path in folder.glob("*.py")
        for word in words
        if path.name not in allowed and word in path.read_text()
    ]
    assert offenders == [], sys.version
