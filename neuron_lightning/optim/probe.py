"""Whether an optimizer class may be run on flat pieces of its parameters: tried, not looked up in a list.

ZeRO-1 updates a parameter in pieces on several ranks, tensor parallelism updates a shard of it. That is the
same as updating it whole only if the class treats every element on its own. Such a class passes here, whoever
wrote it; LBFGS, Adafactor and Muon do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from neuron_lightning.errors import OptimizerError
from neuron_lightning.optim.inner import FAILURES, plain_step, twin

_SHAPE = (4, 6)
_CUT = 13
"""Not a multiple of a row: the cut goes through one."""
_NUM_STEPS = 3
_TOLERANCE = 1e-9
_IMPLEMENTATIONS = ("fused", "foreach", "capturable", "differentiable")


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What the probe found out about an optimizer class.

    Attributes:
        elementwise: pieces update exactly as the whole does.
        bucketwise: pieces may also be updated in separate calls of ``step`` (no state outside parameters).
        reason: why it is not element-wise; empty if it is.
        element_names: state entries with one value an element.
        scalar_dtypes: state entries with one value a parameter; dtype if it is a tensor, None if a number.
    """

    elementwise: bool
    bucketwise: bool = False
    reason: str = ""
    element_names: frozenset[str] = frozenset()
    scalar_dtypes: dict[str, torch.dtype | None] = field(default_factory=dict)


def examine(outer: Optimizer) -> Traits:
    """Runs twins of ``outer`` on tiny float64 tensors on the CPU, whole and in two pieces, and compares."""
    found: Traits | None = None
    seen: list[dict[str, Any]] = []
    for group in outer.param_groups:
        options = _options(outer, group)
        if options in seen:
            continue
        seen.append(options)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            traits = _examine_group(outer, options)
        if not traits.elementwise:
            return traits
        found = traits if found is None else _merge(found, traits)
    return found or Traits(elementwise=False, reason="it has no parameters")


def require_elementwise(outer: Optimizer, traits: Traits, *, zero1: bool) -> None:
    """Refuses a class that cannot work on pieces.

    Raises:
        OptimizerError: names the class, what was seen, and what to do.
    """
    if traits.elementwise:
        return
    name = type(outer).__name__
    if zero1:
        rule = "ZeRO-1 updates each parameter in flat pieces on several ranks"
        remedy = "switch ZeRO-1 off (zero1=False, zero_one_enabled=False)"
    else:
        rule = "tensor parallelism updates each parameter shard by shard"
        remedy = "use tensor_parallel_size=1"
    raise OptimizerError(
        f"{name} cannot be used here: {rule}, which equals updating it whole only for an optimizer that treats "
        f"every element on its own, and {name} does not ({traits.reason}); {remedy}, or choose an element-wise "
        "optimizer such as AdamW, Adam or SGD."
    )


def _options(outer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters for the probe: the group's own, but a step large enough to see, in the plainest code."""
    options = {**outer.defaults, **{k: v for k, v in group.items() if k not in ("params", "initial_lr")}}
    options |= {k: False for k in _IMPLEMENTATIONS if k in options}
    return options | ({"lr": 0.05} if "lr" in options else {})


def _examine_group(outer: Optimizer, options: dict[str, Any]) -> Traits:
    whole = _values(0).reshape(_SHAPE)
    halves = [half.clone() for half in (_values(0)[:_CUT], _values(0)[_CUT:])]
    try:
        reference = _train(outer, options, [whole], together=True)
        _train(outer, options, halves, together=True)
    except FAILURES as error:
        return Traits(elementwise=False, reason=f"on a piece its step raised {type(error).__name__}: {error}")
    entries = dict(reference.state.get(whole, {}))
    for name, value in entries.items():
        if isinstance(value, Tensor) and value.shape != whole.shape and value.numel() != 1:
            return Traits(
                elementwise=False,
                reason=f"its state {name!r} has shape {tuple(value.shape)} for a parameter of shape {_SHAPE}",
            )
        if not isinstance(value, (Tensor, int, float)):
            return Traits(elementwise=False, reason=f"its state {name!r} is a {type(value).__name__}")
    worst = float((torch.cat(halves) - whole.flatten()).abs().max())
    if not worst <= _TOLERANCE:
        return Traits(elementwise=False, reason=f"a parameter updated in two pieces is off by {worst:.3g}")
    per_element = {n for n, v in entries.items() if isinstance(v, Tensor) and v.shape == whole.shape}
    return Traits(
        elementwise=True,
        bucketwise=_is_bucketwise(outer, options, whole),
        element_names=frozenset(per_element),
        scalar_dtypes={
            n: v.dtype if isinstance(v, Tensor) else None for n, v in entries.items() if n not in per_element
        },
    )


def _is_bucketwise(outer: Optimizer, options: dict[str, Any], whole: Tensor) -> bool:
    halves = [half.clone() for half in (_values(0)[:_CUT], _values(0)[_CUT:])]
    try:
        _train(outer, options, halves, together=False)
    except FAILURES:
        return False
    return float((torch.cat(halves) - whole.flatten()).abs().max()) <= _TOLERANCE


def _train(outer: Optimizer, options: dict[str, Any], tensors: list[Tensor], *, together: bool) -> Optimizer:
    """A few steps on ``tensors``, all in one call of ``step`` or each in its own."""
    group = {**options, "params": list(tensors)}
    optimizer = twin(outer, [group])
    initial = _initial_state(outer)
    for tensor in tensors:
        if initial:
            optimizer.state[tensor] = {name: make(tensor) for name, make in initial.items()}
    for step in range(1, _NUM_STEPS + 1):
        grads = torch.split(_values(step), [t.numel() for t in tensors])
        for members in [tensors] if together else [[t] for t in tensors]:
            for tensor, grad in zip(tensors, grads, strict=True):
                mine = any(tensor is member for member in members)
                tensor.grad = grad.reshape(tensor.shape).clone() if mine else None
            group["params"] = list(members)
            plain_step(optimizer)
    return optimizer


def _initial_state(outer: Optimizer) -> dict[str, Callable[[Tensor], Any]]:
    """Makers of the state that the constructor of some classes (Adagrad) fills in before the first step."""
    makers: dict[str, Callable[[Tensor], Any]] = {}
    for param, entries in outer.state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == param.shape and value.numel():
                makers[name] = partial(_filled, value=float(value.flatten()[0]))
            else:
                makers[name] = partial(_copied, value=value)
        break
    return makers


def _filled(like: Tensor, *, value: float) -> Tensor:
    return torch.full_like(like, value)


def _copied(_: Tensor, *, value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _merge(one: Traits, other: Traits) -> Traits:
    return Traits(
        elementwise=True,
        bucketwise=one.bucketwise and other.bucketwise,
        element_names=one.element_names | other.element_names,
        scalar_dtypes={**one.scalar_dtypes, **other.scalar_dtypes},
    )


def _values(seed: int) -> Tensor:
    """Fixed numbers of both signs and several magnitudes; no random state is touched."""
    grid = torch.arange(_SHAPE[0] * _SHAPE[1], dtype=torch.float64, device="cpu")
    return torch.sin(grid * (1.3 + seed) + seed) * (0.5 + grid / 7.0)
