"""Optimizer state by parameter and flat range: what checkpoints save and load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuron_lightning.errors import OptimizerError
from neuron_lightning.optim.flat import OwnPiece
from neuron_lightning.optim.probe import Traits

MASTER = "master"


@dataclass(kw_only=True)
class ParamState:
    """Optimizer state of the elements ``[start, stop)`` of one local parameter, flattened.

    Attributes:
        param: the parameter of the model.
        start: first element that this rank updates.
        stop: one past the last.
        tensors: entries with one value an element, each (stop - start,); ``master`` is the fp32 weight where
            such a copy is kept. Views of live state: copy before the next step.
        scalars: entries with one value a parameter, such as ``step``.
        name: for the caller's use; the optimizer does not know names.
    """

    param: nn.Parameter
    start: int
    stop: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    name: str = ""


def export_piece(
    piece: OwnPiece, param: nn.Parameter, state: Mapping[str, Any], traits: Traits
) -> ParamState:
    """The state of one piece (without the master weight).

    Raises:
        OptimizerError: the optimizer keeps state that belongs to no element and is no number.
    """
    result = ParamState(param=param, start=piece.where.start, stop=piece.where.stop)
    for name, value in state.items():
        if is_per_element(name, value, piece, traits):
            result.tensors[name] = value.reshape(-1)
        elif isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
            result.scalars[name] = float(value)
        elif value is not None:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise OptimizerError(
                f"optimizer state {name!r} ({shape}) of a parameter of shape {tuple(param.shape)} is neither one "
                "value an element nor a number, so it cannot be saved independently of the layout; use an "
                "element-wise optimizer, or save without optimizer state (save_weights_only=True)."
            )
    return result


def import_piece(
    piece: OwnPiece, given: ParamState, group: Mapping[str, Any], traits: Traits
) -> dict[str, Any]:
    """State for one piece from what was saved; copies, in the dtype and on the device that updates need."""
    target = piece.tensor
    state: dict[str, Any] = {}
    for name, value in given.tensors.items():
        if name == MASTER:
            continue
        check_length(name, value, given)
        dtype = target.dtype if value.is_floating_point() else value.dtype
        state[name] = value.detach().to(target.device, dtype, copy=True).reshape(target.shape)
    on_device = bool(group.get("capturable") or group.get("fused"))
    for name, number in given.scalars.items():
        dtype_or_none = traits.scalar_dtypes.get(name, torch.float32)
        if name in traits.element_names:
            state[name] = torch.full_like(target, number)
        elif dtype_or_none is None:
            state[name] = int(number) if float(number).is_integer() else number
        else:
            state[name] = torch.tensor(
                number, dtype=dtype_or_none, device=target.device if on_device else "cpu"
            )
    return state


def adopt_state(outer: Optimizer, inner: Optimizer, pieces: Iterable[tuple[nn.Parameter, OwnPiece]]) -> None:
    """Moves state that the user's instance already has to the pieces that stand for its parameters."""
    for param, piece in pieces:
        entries = outer.state.get(param)
        if not entries:
            continue
        cut = slice(piece.where.start, piece.where.stop)
        inner.state[piece.tensor] = {
            name: value.detach()
            .reshape(-1)[cut]
            .to(piece.tensor.dtype, copy=True)
            .reshape(piece.tensor.shape)
            if isinstance(value, Tensor) and value.shape == param.shape and name != "step"
            else value
            for name, value in entries.items()
        }
    outer.state.clear()


def is_per_element(name: str, value: Any, piece: OwnPiece, traits: Traits) -> bool:
    """Whether a state entry has one value an element; for 0-d parameters only the name can tell."""
    if not isinstance(value, Tensor) or value.shape != piece.tensor.shape:
        return False
    return value.dim() > 0 or name in traits.element_names


def check_length(name: str, value: Tensor, given: ParamState) -> None:
    """Checks that ``value`` has one value for each element of ``given``.

    Raises:
        OptimizerError: it does not.
    """
    if value.numel() != given.stop - given.start:
        raise OptimizerError(
            f"optimizer state {name!r} has {value.numel()} values for the elements [{given.start}, {given.stop}) "
            f"of a parameter of shape {tuple(given.param.shape)}: it must have one each."
        )
