"""Reads of device tensors on the host, with the line that asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from neuron_lightning.lightning.recompiles.places import Place, called_by_package, place_of_caller

_METHODS = {
    "item": ".item()",
    "tolist": ".tolist()",
    "numpy": ".numpy()",
    "cpu": ".cpu()",
    "__bool__": "a truth value (if, while, assert, and, or)",
    "__int__": "int()",
    "__float__": "float()",
    "__index__": "use as an index",
    "__format__": "formatting into text",
    "__repr__": "printing",
}


@dataclass
class ReadWatch:
    """Notes reads of tensors of a device type between :meth:`begin` and :meth:`end`; costs nothing else.

    Attributes:
        device_type: whose tensors.
        found: place of each read, and what was called there, once each.
    """

    device_type: str
    found: dict[tuple[Place | None, str], int] = field(default_factory=dict)
    _on: bool = False
    _inside: bool = False
    _inherited: list[str] = field(default_factory=list)

    def begin(self) -> None:
        """Starts to watch."""
        if self._on:
            return
        self._on, self.found = True, {}
        self._inherited = [name for name in _METHODS if name not in vars(torch.Tensor)]
        for name in _METHODS:
            setattr(torch.Tensor, name, self._watched(name, getattr(torch.Tensor, name)))

    def end(self) -> None:
        """Stops."""
        if self._on:
            self._on = False
            for name in _METHODS:
                original = getattr(torch.Tensor, name).__wrapped__
                if name in self._inherited:
                    delattr(torch.Tensor, name)
                else:
                    setattr(torch.Tensor, name, original)

    def _watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._inside or tensor.device.type != self.device_type or called_by_package():
                return original(tensor, *args, **kwargs)
            key = (place_of_caller(), _METHODS[name])
            self.found[key] = self.found.get(key, 0) + 1
            self._inside = True  # one read may call another
            try:
                return original(tensor, *args, **kwargs)
            finally:
                self._inside = False

        read.__wrapped__ = original  # type: ignore[attr-defined]
        return read
