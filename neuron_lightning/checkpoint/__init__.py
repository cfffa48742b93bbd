"""Checkpoints: topology-free folders of safetensors and JSON that are verified, committed atomically, and never pickled."""

from neuron_lightning.checkpoint.asynchronous import AsyncSaver
from neuron_lightning.checkpoint.folder import (
    check_trainer_state,
    is_checkpoint,
    load_average_state,
    load_module_state,
    load_optimizer_state,
    read_full_state,
    read_rank_state,
    read_trainer_state,
    remove_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from neuron_lightning.checkpoint.listing import CheckpointInfo, list_checkpoints

__all__ = [
    "AsyncSaver",
    "CheckpointInfo",
    "check_trainer_state",
    "is_checkpoint",
    "list_checkpoints",
    "load_average_state",
    "load_module_state",
    "load_optimizer_state",
    "read_full_state",
    "read_rank_state",
    "read_trainer_state",
    "remove_checkpoint",
    "verify_checkpoint",
    "write_checkpoint",
]
