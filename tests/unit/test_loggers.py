"""Event files read back: scalars at the right step, hyper-parameters, one writer, NxD's protocol."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from neuron_lightning.errors import ConfigError
from neuron_lightning.lightning.loggers import NeuronTensorBoardLogger
from tests.unit.test_progress import Module, data, trainer


def scalars(logger: NeuronTensorBoardLogger, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(name)]


@pytest.mark.parametrize("log_rank0", [False, True])
def test_scalars_stand_at_the_step_that_they_are_given(tmp_path: Path, log_rank0: bool) -> None:
    logger = NeuronTensorBoardLogger(save_dir=tmp_path, log_rank0=log_rank0)
    for step in (1, 2, 5):
        logger.log_metrics({"loss": 0.5 * step}, step)
    logger.save()
    assert scalars(logger, "loss") == [(1, 0.5), (2, 1.0), (5, 2.5)]
    assert logger.log_rank0 is log_rank0


def test_records_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    logger = NeuronTensorBoardLogger(save_dir=tmp_path)
    logger.log_metrics({"loss": 3.0}, 1)
    logger.save()
    assert scalars(logger, "loss") == [(1, 3.0)]
    logger.log_metrics({"loss": 2.0}, 2)
    logger.save()
    assert scalars(logger, "loss") == [(1, 3.0), (2, 2.0)]


def test_print_step_decides_where_a_script_sets_it(tmp_path: Path) -> None:
    logger = NeuronTensorBoardLogger(save_dir=tmp_path)
    logger.print_step = -1
    logger.log_metrics({"loss": 1.0}, 1)
    logger.print_step = 2
    logger.log_metrics({"loss": 2.0}, 2)
    logger.log_metrics({"other": 3.0})
    logger.print_step = -1
    logger.log_metrics({"loss": 9.0}, 3)
    logger.save()
    assert scalars(logger, "loss") == [(2, 2.0)]
    assert scalars(logger, "other") == [(2, 3.0)]


def test_hyper_parameters_are_written(tmp_path: Path) -> None:
    logger = NeuronTensorBoardLogger(save_dir=tmp_path)
    logger.log_hyperparams({"lr": 0.1, "model": {"layers": 2}})
    logger.save()
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data
    assert plugin.plugin_name == "hparams"
    assert "layers: 2" in (Path(logger.log_dir) / "hparams.yaml").read_text()


def test_only_rank_zero_creates_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = NeuronTensorBoardLogger(save_dir=tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    logger.log_hyperparams({"lr": 0.1})
    logger.save()
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []


def test_under_a_trainer(tmp_path: Path) -> None:
    logger = NeuronTensorBoardLogger(save_dir=tmp_path, name="run")
    from neuron_lightning.lightning.progress import NeuronTQDMProgressBar

    trainer(tmp_path, NeuronTQDMProgressBar(), logger=logger, max_steps=3).fit(Module(log=("loss",)), data())
    assert [value for _, value in scalars(logger, "loss")] == [100.0, 101.0, 102.0]


def test_a_folder_in_the_first_place_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save_dir="):
        NeuronTensorBoardLogger(str(tmp_path))
