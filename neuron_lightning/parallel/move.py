"""Moves a module between devices and keeps its parameters: the same objects, with all that is attached to them."""

from __future__ import annotations

import torch
from torch import nn


def move_module(module: nn.Module, device: torch.device) -> None:
    """Moves parameters, their gradients and buffers to ``device``; parameters on ``meta`` stay.

    ``nn.Module.to`` keeps a parameter only between devices whose tensors PyTorch lets share an object, such as cpu and
    cuda. To and from others, ``neuron`` among them, it puts bare new parameters in their place: their shard specs are
    lost, and an optimizer that was made before holds tensors that nobody trains.

    Args:
        module: changed in place; tied parameters stay tied.
        device: the target.

    Raises:
        RuntimeError: a parameter is held by a graph that is still to be differentiated.
    """
    for child in module.modules():
        for param in child.parameters(recurse=False):
            if param.device != device and not param.is_meta:
                move_parameter(param, device)
        for leaf, buffer in child._buffers.items():
            if buffer is not None and not buffer.is_meta:
                child._buffers[leaf] = buffer.to(device)
    module.to(device)  # nothing left to move; Lightning's modules note where they are


def move_parameter(param: nn.Parameter, device: torch.device) -> None:
    """Moves one parameter and its gradient, as :func:`move_module` does."""
    values = param.detach().to(device)
    grad = None if param.grad is None else param.grad.to(device)
    # No public question for what nn.Module.to asks (torch 2.9 to 2.13).
    if torch._has_compatible_shallow_copy_type(param, values):
        param.data = values
        param.grad = grad
        return
    moved = nn.Parameter(values, requires_grad=param.requires_grad)
    moved.grad = grad
    moved.__dict__.update(param.__dict__)
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(param, hooks):
            setattr(moved, hooks, getattr(param, hooks))
    torch.utils.swap_tensors(param, moved)  # type: ignore[no-untyped-call]
