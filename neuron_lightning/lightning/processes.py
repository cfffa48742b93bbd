"""The process group, the mesh, and what all ranks must agree on before and while they run."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy

from neuron_lightning.backends import get_backend
from neuron_lightning.errors import ConfigError, LaunchError
from neuron_lightning.lightning.launch import detect
from neuron_lightning.lightning.strategy_collectives import gather_objects, is_distributed
from neuron_lightning.parallel import mesh

_log = logging.getLogger(__name__)

_TRAINER_SETTINGS = (
    "max_steps",
    "max_epochs",
    "min_steps",
    "min_epochs",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "log_every_n_steps",
)


def init_process_group(strategy: ParallelStrategy, timeout: timedelta) -> None:
    """Creates the default process group unless there is one. All ranks together.

    A plain single process gets none: nothing in this package communicates then.

    Raises:
        LaunchError: a process group exists, of another size than the Trainer means.
    """
    world, environment = strategy.world_size, strategy.cluster_environment
    if is_distributed():
        if dist.get_world_size() != world:
            raise LaunchError(
                f"the Trainer means {world} process(es), but torch.distributed is initialised with "
                f"{dist.get_world_size()}: give Trainer(devices=, num_nodes=) that match, or leave them out."
            )
        return
    if environment is None or (world == 1 and detect() is None):
        return
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = (
        environment.main_address,
        str(environment.main_port),
    )
    get_backend().init_process_group(rank=strategy.global_rank, world_size=world, timeout=timeout)
    atexit.register(_destroy_process_group)  # gloo's threads must not outlive the interpreter


def _destroy_process_group() -> None:
    if is_distributed():
        get_backend().destroy_process_group()


def build_mesh(*, tp: int, sequence_parallel: bool) -> None:
    """Makes the layout current; one that an earlier run left is used again if equal, else destroyed first.

    All ranks together.
    """
    if mesh.is_initialized():
        left = mesh.current()
        if (left.sizes["tp"], left.sequence_parallel, left.world_size) == (
            tp,
            sequence_parallel,
            _world_size(),
        ):
            return
        _log.info("the layout %s of an earlier run is replaced", mesh.describe(left))
        mesh.destroy()
    mesh.initialize(tp=tp, sequence_parallel=sequence_parallel)


def _world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def check_equal_settings(settings: Mapping[str, str], trainer: Trainer, precision: str) -> None:
    """Checks that every rank means the same run. All ranks together.

    Raises:
        ConfigError: on all ranks, naming each differing key with its values and ranks.
    """
    mine = {**settings, "precision": precision}
    mine.update({f"Trainer.{name}": repr(getattr(trainer, name, None)) for name in _TRAINER_SETTINGS})
    mine.update({f"hparams.{key}": repr(value) for key, value in _plain_hparams(trainer).items()})
    everyone = gather_objects(mine)
    differences = []
    for key in sorted({key for one in everyone for key in one}):
        by_value: dict[str, list[int]] = {}
        for rank, one in enumerate(everyone):
            by_value.setdefault(one.get(key, "not set"), []).append(rank)
        if len(by_value) > 1:
            said = "; ".join(f"{value} on rank(s) {_short(ranks)}" for value, ranks in by_value.items())
            differences.append(f"{key}: {said}")
    if differences:
        raise ConfigError(
            "all ranks must run with the same configuration, but they differ:\n  "
            + "\n  ".join(differences)
            + "\nStart every rank with the same command line, files and environment."
        )


def _plain_hparams(trainer: Trainer) -> dict[str, Any]:
    module = trainer.lightning_module
    hparams: Mapping[str, Any] = module.hparams if module is not None else {}
    return {
        key: value
        for key, value in hparams.items()
        if isinstance(value, (bool, int, float)) and "rank" not in key
    }


def _short(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f", … ({len(ranks)} in all)" if len(ranks) > 8 else "")
