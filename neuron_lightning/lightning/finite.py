"""No checkpoint of a run that has blown up: what is about to be saved is looked at first, on all ranks together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuron_lightning.checkpoint import exchange, state
from neuron_lightning.errors import CheckpointError


def check_finite(
    path: Any,
    module_state: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimizers: Sequence[Any],
    step: int | None,
) -> None:
    """Checks that no tensor of a checkpoint holds NaN or infinity. Collective; reads each tensor, and each device once.

    Buffers are not looked at: masks hold infinities on purpose.

    Raises:
        CheckpointError: on all ranks, naming the first such tensor and its rank.
    """
    exchange.together(
        f"save {path}",
        lambda: _check(_named(module_state, parameters, optimizers), step),
    )


def _named(
    module_state: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], optimizers: Sequence[Any]
) -> Iterator[tuple[str, Tensor]]:
    names = state.Names(parameters)
    for name, tensor in module_state.items():
        if names.parameter(name, tensor) is not None:
            yield f"the weights {name}", tensor
    for optimizer in optimizers:
        for piece in state.export(optimizer):
            for key, tensor in piece.tensors.items():
                yield f"the optimizer state {key} of {names.name_of(piece.param)}", tensor


def _check(named: Iterator[tuple[str, Tensor]], step: int | None) -> None:
    held = [
        (name, tensor.detach()) for name, tensor in named if tensor.is_floating_point() and tensor.numel()
    ]
    # A sum is finite unless an element is not (or it overflows: then the second look finds nothing).
    sums = [
        tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
        for _, tensor in held
    ]
    # After a fit the weights are back on the host, the optimizer's state is not.
    devices = {one.device for one in sums}
    by_device = [torch.stack([one.float() for one in sums if one.device == device]) for device in devices]
    if all(bool(torch.isfinite(some).all()) for some in by_device):
        return
    for name, tensor in held:
        wrong = int((~torch.isfinite(tensor)).sum())
        if wrong:
            raise CheckpointError(
                f"{name} holds {wrong} value(s) of {tensor.numel()} that are NaN or infinite at step {step}: nothing is "
                "saved, so that the checkpoints before stay the last good ones. Go on from one of them with a lower "
                "learning rate, gradient clipping, or without the data that caused it."
            )
