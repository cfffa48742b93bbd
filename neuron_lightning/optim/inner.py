"""The user's optimizer, running on other tensors.

The wrapper never steps the user's instance: it steps a twin of the same class, attributes and
hyper-parameters whose tensors are this rank's pieces. The user's instance keeps the parameter groups that
schedulers write into.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

FAILURES = (
    TypeError,
    ValueError,
    RuntimeError,
    LookupError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)
"""What an optimizer class raises when it is given tensors that it is not made for."""

NO_RATE = 1e-30
"""Stands for a learning rate of 0 on the device: torch's capturable classes divide by it, and 0 / 0 is not a number
wherever a gradient has always been 0. An update by this rate is below the resolution of every weight but 0."""

Groups = list[dict[str, Any]]
AsData = Callable[[float, Tensor], Tensor]


class InnerOptimizer:
    """A twin of an optimizer over other tensors.

    Args:
        outer: the user's instance.
        members: for each of its groups the tensors that stand for the group's parameters.
        fused: run the fused implementation although the user left the choice open.
        as_data: where graphs are recorded: makes a number a tensor on the device of another. Learning rates are then
            given as tensors, and the implementation is chosen that keeps its step count on the device.

    Attributes:
        optimizer: the twin; its ``state`` is keyed by the members.
    """

    def __init__(
        self,
        outer: Optimizer,
        members: Sequence[list[Tensor]],
        *,
        fused: bool = False,
        as_data: AsData | None = None,
    ) -> None:
        self._outer = outer
        self._overrides: dict[str, Any] = {"fused": True} if fused else {}
        self._as_data = as_data
        self._rates: list[tuple[float, Tensor] | None] = [None] * len(members)
        groups = [
            {**group, **self._overrides, "params": list(tensors)}
            for group, tensors in zip(outer.param_groups, members, strict=True)
        ]
        if as_data is not None and any(members):
            self._overrides = recordable(outer, next(m[0] for m in members if m), as_data)
            groups = [{**group, **self._overrides} for group in groups]
        self._keeps = set(self._overrides) | {"params"}
        self.optimizer = twin(outer, groups)
        self._groups = self.optimizer.param_groups

    def pull(self) -> None:
        """Takes every hyper-parameter from the user's groups."""
        for number, (theirs, ours) in enumerate(zip(self._outer.param_groups, self._groups, strict=True)):
            ours.update((k, v) for k, v in theirs.items() if k not in self._keeps)
            if "lr" in self._overrides and ours["params"]:
                ours["lr"] = self._rate(number, theirs["lr"], ours["params"][0])

    def push(self) -> None:
        """Gives back the group entries that the step itself has changed (a step counter, an estimate)."""
        for theirs, ours in zip(self._outer.param_groups, self._groups, strict=True):
            for key, value in ours.items():
                if key not in self._keeps and theirs.get(key) is not value:
                    theirs[key] = value

    def _rate(self, number: int, value: Any, like: Tensor) -> Any:
        """A group's learning rate on the device; the same tensor for as long as it stays the same."""
        if isinstance(value, Tensor) or self._as_data is None:
            return value
        known = self._rates[number]
        if known is None or known[0] != value:
            wide = like.new_empty((), dtype=torch.promote_types(like.dtype, torch.float32))
            known = self._rates[number] = (value, self._as_data(value or NO_RATE, wide))
        return known[1]

    def step(self, only: set[int] | None = None, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the members that have a gradient.

        Args:
            only: ``id`` of the members to look at; None for all.
            closure: for classes whose ``step`` evaluates the loss itself.
        """
        if only is None:
            return plain_step(self.optimizer, closure)
        full = self._groups
        parts = [[t for t in group["params"] if id(t) in only] for group in full]
        narrowed = [
            (group, {**group, "params": part}) for group, part in zip(full, parts, strict=True) if part
        ]
        self.optimizer.param_groups = [part for _, part in narrowed]
        try:
            return plain_step(self.optimizer, closure)
        finally:
            for group, part in narrowed:
                group.update((k, v) for k, v in part.items() if k != "params")
            self.optimizer.param_groups = full


def twin(outer: Optimizer, groups: Groups) -> Optimizer:
    """An optimizer with the class and attributes of ``outer``, over ``groups``, with empty state and no hooks.

    Its constructor does not run. Attributes that list the parameters of ``outer`` list those of ``groups``.
    """
    copy: Optimizer = object.__new__(type(outer))
    attributes = {k: v for k, v in vars(outer).items() if k != "step" and not k.startswith("_optimizer_")}
    originals = {id(p) for group in outer.param_groups for p in group["params"]}
    members = [t for group in groups for t in group["params"]]
    for name, value in attributes.items():
        if isinstance(value, list) and value and all(id(item) in originals for item in value):
            attributes[name] = members
    attributes |= {"state": defaultdict(dict), "param_groups": groups, "defaults": dict(outer.defaults)}
    Optimizer.__setstate__(copy, attributes)
    return copy


def plain_step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
    """``optimizer.step`` without the hooks and profiler range that torch puts around it; the wrapper has its own."""
    function = type(optimizer).step
    if getattr(function, "hooked", False):
        function = inspect.unwrap(function, stop=lambda f: not getattr(f, "hooked", False))
    return function(optimizer) if closure is None else function(optimizer, closure)


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether ``step`` cannot run without a closure, as LBFGS'."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def can_fuse(outer: Optimizer, kinds: set[tuple[torch.device, torch.dtype]]) -> bool:
    """Whether the user left the implementation open and a fused one works for all of ``kinds``."""
    for group in outer.param_groups:
        if "fused" not in group or group["fused"] is not None or group.get("foreach") is not None:
            return False
        if group.get("capturable") or group.get("differentiable") or isinstance(group.get("lr"), Tensor):
            return False
    return all(_fuses(outer, device, dtype) for device, dtype in kinds)


def _fuses(outer: Optimizer, device: torch.device, dtype: torch.dtype) -> bool:
    """Tries it, with a parameter whose first gradient comes late (torch's fused SGD fails on its momentum)."""
    early, late = (torch.zeros(1, dtype=dtype, device=device) for _ in range(2))
    optimizer = twin(
        outer, [{**group, "fused": True, "params": [early, late]} for group in outer.param_groups[:1]]
    )
    try:
        for tensor in (early, late):
            tensor.grad = torch.zeros_like(tensor)
            plain_step(optimizer)
    except FAILURES:
        return False
    return True


def recordable(outer: Optimizer, like: Tensor, as_data: AsData) -> dict[str, Any]:
    """The group entries with which a step records the same graph whatever the learning rate and the step count are.

    What a class can do is tried: a learning rate that is a tensor on the device, with ``capturable`` if it has that.
    Where it cannot, the number stays in the graph, and some of its values cost a compilation each.
    """
    group = outer.param_groups[0]
    plain: dict[str, Any] = {name: False for name in ("foreach", "fused") if name in group}
    if "capturable" in group:
        plain["capturable"] = True
    wide = like.new_empty((), dtype=torch.promote_types(like.dtype, torch.float32))
    for overrides in ({**plain, "lr": as_data(0.5, wide)}, plain):
        if ("lr" in group or "lr" not in overrides) and _runs(outer, like, overrides):
            return overrides
    return dict.fromkeys(plain, False)


def _runs(outer: Optimizer, like: Tensor, overrides: dict[str, Any]) -> bool:
    tensor = torch.zeros(1, dtype=like.dtype, device=like.device)
    group = {**outer.param_groups[0], **overrides, "params": [tensor]}
    tensor.grad = torch.zeros_like(tensor)
    try:
        plain_step(twin(outer, [group]))
    except FAILURES:
        return False
    return True
