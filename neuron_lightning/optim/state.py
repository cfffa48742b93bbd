"""Optimizer state by parameter and flat range: what checkpoints save and load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuron_lightning.backends import get_backend
from neuron_lightning.errors import OptimizerError
from neuron_lightning.optim.bucket import Unit
from neuron_lightning.optim.buckets import Piece
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
    unit: Unit, piece: Piece, param: nn.Parameter, state: Mapping[str, Any], traits: Traits
) -> ParamState:
    """The state of one piece (without the master weight).

    Raises:
        OptimizerError: the optimizer keeps state that belongs to no element and is no number.
    """
    result = ParamState(param=param, start=piece.start, stop=piece.stop)
    for name, value in state.items():
        if is_per_element(name, value, unit, traits):
            result.tensors[name] = unit.cut(value, piece)
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


def import_unit(
    unit: Unit,
    given: Mapping[Piece, ParamState],
    present: Mapping[str, Any],
    group: Mapping[str, Any],
    traits: Traits,
) -> dict[str, Any]:
    """State for one unit from what was saved of its pieces; copies, in the dtype and on the device that updates need.

    Args:
        unit: what the state is for.
        given: what was saved, of all pieces or of some.
        present: the state that the unit has; pieces that are not given keep theirs.
        group: its parameter group.
        traits: of the optimizer class.

    Raises:
        OptimizerError: values that do not fit, or numbers that differ between pieces that are updated together.
    """
    state: dict[str, Any] = {}
    for name in dict.fromkeys(name for one in given.values() for name in one.tensors if name != MASTER):
        parts = {piece: one.tensors[name] for piece, one in given.items() if name in one.tensors}
        for piece, value in parts.items():
            check_length(name, value, given[piece])
        state[name] = _filled(unit, parts, present.get(name))
    for name in dict.fromkeys(name for one in given.values() for name in one.scalars):
        numbers = {one.scalars[name] for one in given.values() if name in one.scalars}
        if len(numbers) > 1:
            raise OptimizerError(
                f"optimizer state {name!r} is {sorted(numbers)} for parameters that are updated as one tensor here: it "
                "must be the same number for all; load the weights alone, or switch ZeRO-1 off."
            )
        state[name] = _number(name, numbers.pop(), unit, group, traits)
    return state


def fill(unit: Unit, parts: Mapping[Piece, Tensor]) -> None:
    """Copies saved values into the pieces of the unit's own tensor."""
    with torch.no_grad():
        unit.tensor.copy_(_filled(unit, parts, unit.tensor))


def _filled(unit: Unit, parts: Mapping[Piece, Tensor], present: Any) -> Tensor:
    """A new tensor for ``unit`` with these values in its pieces, and the present ones (or zeros) elsewhere."""
    target = unit.tensor
    first = next(iter(parts.values()))
    dtype = target.dtype if first.is_floating_point() else first.dtype
    if len(unit.pieces) == 1:
        return first.detach().to(target.device, dtype, copy=True).reshape(target.shape)
    # Put together on the host, so that it reaches the device in one transfer and no graph.
    whole = isinstance(present, Tensor) and len(parts) < len(unit.pieces)
    host = (
        present.detach().to("cpu", dtype, copy=True)
        if whole
        else torch.zeros(target.shape, dtype=dtype, device="cpu")
    )
    for piece, value in parts.items():
        unit.cut(host, piece).copy_(value.reshape(-1))
    return host.to(target.device)


def _number(name: str, number: float, unit: Unit, group: Mapping[str, Any], traits: Traits) -> Any:
    dtype = traits.scalar_dtypes.get(name, torch.float32)
    if name in traits.element_names:
        return torch.full_like(unit.tensor, number)
    if dtype is None:
        return int(number) if float(number).is_integer() else number
    if group.get("capturable") or group.get("fused"):
        return get_backend().scalar(number, torch.empty((), dtype=dtype, device=unit.tensor.device))
    return torch.tensor(number, dtype=dtype, device="cpu")


def adopt_state(
    outer: Optimizer, inner: Optimizer, units: Iterable[Unit], params: Sequence[nn.Parameter]
) -> None:
    """Moves state that the user's instance already has to the units that stand for its parameters."""
    for unit in units:
        held = {piece: outer.state.get(params[piece.param]) or {} for piece in unit.pieces}
        names = dict.fromkeys(name for entries in held.values() for name in entries)
        state = {name: _adopted(name, unit, held, params) for name in names}
        if state:
            inner.state[unit.tensor] = state
    outer.state.clear()


def _adopted(name: str, unit: Unit, held: Mapping[Piece, Any], params: Sequence[nn.Parameter]) -> Any:
    found = {piece: entries[name] for piece, entries in held.items() if name in entries}
    piece, value = next(iter(found.items()))
    if not isinstance(value, Tensor) or value.shape != params[piece.param].shape or name == "step":
        return value
    parts = {p: v.detach().reshape(-1)[p.start : p.stop] for p, v in found.items()}
    return _filled(unit, parts, None)


def is_per_element(name: str, value: Any, unit: Unit, traits: Traits) -> bool:
    """Whether a state entry has one value an element; for 0-d parameters only the name can tell."""
    if not isinstance(value, Tensor) or value.shape != unit.tensor.shape:
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
