"""``state_dict`` of a wrapped optimizer: what this rank holds, valid for the same layout only."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from neuron_lightning.errors import OptimizerError
from neuron_lightning.optim.bucket import Unit
from neuron_lightning.optim.engine import Engine
from neuron_lightning.optim.state import MASTER


def local_state(engine: Engine) -> dict[str, Any]:
    """State by index of the parameter, groups as torch writes them, and the layout that it belongs to."""
    numbers = {id(p): i for i, p in enumerate(p for g in engine.outer.param_groups for p in g["params"])}
    state: dict[int, dict[str, Any]] = {}
    for bucket in engine.buckets:
        for unit in bucket.units:
            entries = dict(engine.state.get(unit.tensor, {}))
            if bucket.has_master:
                entries[MASTER] = unit.tensor.detach()
            if entries:
                state[_number(engine, unit, numbers)] = entries
    groups = [
        {
            **{k: v for k, v in group.items() if k != "params"},
            "params": [numbers[id(p)] for p in group["params"]],
        }
        for group in engine.outer.param_groups
    ]
    return {"state": state, "param_groups": groups, "layout": _layout(engine)}


def load_local_state(engine: Engine, state_dict: dict[str, Any]) -> None:
    """Loads what :func:`local_state` returned on this rank.

    Raises:
        OptimizerError: another layout, or other parameter groups.
    """
    saved, current = state_dict.get("layout"), _layout(engine)
    if saved != current:
        raise OptimizerError(
            f"this optimizer state was written under the layout {_summary(saved)}, the present one is "
            f"{_summary(current)}: state_dict() holds one rank's share and loads into the same layout only; use "
            "a checkpoint, which loads into any."
        )
    sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    if sizes != [len(group["params"]) for group in engine.outer.param_groups]:
        raise OptimizerError(
            f"the saved parameter groups have {sizes} parameters, the optimizer's "
            f"{[len(group['params']) for group in engine.outer.param_groups]}; build the same groups."
        )
    for group, given in zip(engine.outer.param_groups, state_dict["param_groups"], strict=True):
        group.update({k: v for k, v in given.items() if k != "params"})
    numbers = {id(p): i for i, p in enumerate(p for g in engine.outer.param_groups for p in g["params"])}
    for bucket in engine.buckets:
        for unit in bucket.units:
            entries = dict(state_dict["state"].get(_number(engine, unit, numbers), {}))
            master = entries.pop(MASTER, None)
            if master is not None:
                unit.tensor.data.copy_(master)
            engine.state[unit.tensor] = {k: _copy(v) for k, v in entries.items()}


def _number(engine: Engine, unit: Unit, numbers: dict[int, int]) -> int:
    """What stands for a unit in torch's state dicts: the number of its first parameter."""
    return numbers[id(engine.params[unit.pieces[0].param])] if unit.pieces else -1


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _layout(engine: Engine) -> dict[str, Any]:
    return {
        "zero1": engine.zero1,
        "sizes": dict(engine.mesh.sizes),
        "coordinates": dict(engine.mesh.coordinates),
        "pieces": [[p.param, p.start, p.stop] for unit in engine.units() for p in unit.pieces],
    }


def _summary(layout: dict[str, Any] | None) -> str:
    if not isinstance(layout, dict):
        return "of a plain torch optimizer"
    shown = ", ".join(f"{axis}={size}" for axis, size in layout["sizes"].items() if size > 1) or "one rank"
    return f"({shown}, zero1={layout['zero1']}, {len(layout['pieces'])} pieces)"
