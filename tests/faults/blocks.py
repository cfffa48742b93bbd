"""A state whose every element is the step, so that a checkpoint which mixes two steps shows itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuron_lightning import checkpoint
from neuron_lightning.errors import CheckpointError
from tests.faults.reference import Lost, Mixed

TENSORS = 6


class Block(nn.Module):
    """Several tensors, so that every rank has some of them to write."""

    def __init__(self, step: int, num_elements: int = 16384) -> None:
        super().__init__()
        tensors = [nn.Parameter(torch.full((num_elements,), float(step))) for _ in range(TENSORS)]
        self.tensors = nn.ParameterList(tensors)

    def become(self, step: int) -> None:
        """The same memory at another step."""
        with torch.no_grad():
            for tensor in self.tensors:
                tensor.fill_(float(step))

    def what(self, step: int) -> dict[str, Any]:
        """The keywords of a save."""
        return {
            "module_state": self.state_dict(),
            "parameters": dict(self.named_parameters()),
            "trainer_state": {"global_step": step, "again": torch.full((1000,), float(step))},
        }


def check_steps(root: Path, *, alone: bool = False) -> list[int]:
    """Steps of all that is committed in ``root``, each read in full; every element must be of that step.

    Args:
        root: the folder that holds checkpoints.
        alone: called by one rank of several: only what needs no other rank is verified.
    """
    steps = []
    for info in checkpoint.list_checkpoints(root):
        try:
            if not alone:
                checkpoint.verify_checkpoint(info.path)
            values = [*checkpoint.read_full_state(info.path).values()]
            trainer = checkpoint.read_trainer_state(info.path)
        except CheckpointError as error:
            raise Lost(f"{info.path} is committed and damaged: {error}") from error
        found = {float(v) for tensor in [*values, trainer["again"]] for v in tensor.unique()}
        if found != {float(trainer["global_step"])} or trainer["global_step"] != info.step:
            raise Mixed(f"{info.path} of step {info.step} holds values of the steps {sorted(found)}")
        steps.append(int(info.step or 0))
    return steps
