"""The operators of a step as Python calls them, and what is different in another step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from neuron_lightning.lightning.recompiles.places import Place, place_of_caller

_LOOKS_ONLY = {"__get__", "size", "dim", "numel", "stride", "is_floating_point", "data_ptr", "__hash__"}
_NAMES: dict[Callable[..., Any], str] = {}
_SHOWN = 3


@dataclass(frozen=True)
class Call:
    """One call: its name, what it was given, and from where."""

    name: str
    shapes: tuple[Any, ...]
    numbers: tuple[Any, ...]
    place: Place | None


class OperatorRecord(TorchFunctionMode):
    """Notes every call of a torch function on a device's tensors while it is active.

    Args:
        device_type: the device's.

    Attributes:
        calls: in order.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type
        self.calls: list[Call] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = self._name(func)
        if name and (not isinstance(result, Tensor) or result.device.type == self._device_type):
            shapes: list[Any] = []
            numbers: list[Any] = []
            _sort_out((*args, *kwargs.values()), shapes, numbers)
            self.calls.append(Call(name, tuple(shapes), tuple(numbers), place_of_caller()))
        return result

    def _name(self, func: Callable[..., Any]) -> str:
        """Empty for what only looks at a tensor."""
        name = _NAMES.get(func)
        if name is None:
            short = getattr(func, "__name__", str(func))
            name = _NAMES[func] = "" if short in _LOOKS_ONLY else resolve_name(func) or short
        return name


def differences(before: Sequence[Call], after: Sequence[Call]) -> list[str]:
    """What is different in ``after``, in words, the first differences first; nothing where nothing is."""
    said: list[str] = []
    for old, new in zip(before, after, strict=False):
        if old.name != new.name or old.place != new.place:
            said.append(f"{new.place}: {new.name} is called where {old.name} was ({old.place})")
            return said  # from here on everything is
        said += [text for text in _compared(old, new) if text not in said]
    if len(before) != len(after):
        longer, more = (after, "more") if len(after) > len(before) else (before, "fewer")
        first = longer[min(len(before), len(after))]
        said.append(
            f"{first.place}: {abs(len(after) - len(before))} {more} operators are called, from {first.name} on"
        )
    return said


def shown(said: Sequence[str]) -> str:
    """The first few of them."""
    more = f"; and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
    return "; ".join(said[:_SHOWN]) + more


def _compared(old: Call, new: Call) -> list[str]:
    if len(old.numbers) != len(new.numbers) or len(old.shapes) != len(new.shapes):
        return [f"{new.place}: {new.name} is called with other arguments"]
    said = [
        f"{new.place}: {new.name} got the Python number {b!r}, it was {a!r}"
        for a, b in zip(old.numbers, new.numbers, strict=True)
        if a != b and not (a != a and b != b)
    ]
    return said + [
        f"{new.place}: {new.name} got a tensor of shape {b}, it was {a}"
        for a, b in zip(old.shapes, new.shapes, strict=True)
        if a != b
    ]


def _sort_out(values: Any, shapes: list[Any], numbers: list[Any]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            shapes.append((tuple(value.shape), str(value.dtype).removeprefix("torch.")))
        elif isinstance(value, (bool, int, float)):
            numbers.append(value)
        elif isinstance(value, (list, tuple)):
            _sort_out(value, shapes, numbers)
        elif isinstance(value, slice):
            _sort_out((value.start, value.stop, value.step), shapes, numbers)
