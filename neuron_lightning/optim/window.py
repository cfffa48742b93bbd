"""Gradients of one accumulation window: from autograd into the buckets, by hook.

A window opens at the first backward after a step (or ``zero_grad``), is *reduced* once, and is over when the
step has consumed it.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from neuron_lightning.errors import OptimizerError
from neuron_lightning.optim.bucket import Bucket

_TAKEN_BY = "_gradient_window"
"""Attribute of a parameter: the window of the optimizer that was wrapped around it last."""


class Phase(enum.Enum):
    """Where a window stands."""

    OPEN = "gradients accumulate on each rank"
    REDUCED = "gradients are reduced, the step has not been taken"
    OVER = "the step has been taken"


class Window:
    """Watches parameters and adds up their gradients in the tensors of the buckets.

    Where parameter and accumulation dtype agree, ``p.grad`` *is* the view and autograd adds into it by
    itself. Where they differ, each gradient is added to the view as it arrives and ``p.grad`` stays None.

    Args:
        params: distinct trainable parameters.
        homes: the bucket in which the gradient of each accumulates; None for a parameter without elements.

    Attributes:
        phase: see :class:`Phase`.
        received: by parameter, whether a gradient arrived (after the reduction: on any rank).
    """

    def __init__(self, params: list[nn.Parameter], homes: list[Bucket | None]) -> None:
        self.phase = Phase.OPEN
        self.received = [False] * len(params)
        self._params = params
        self._homes = homes
        self._token = object()
        self._direct = [
            home is not None and home.grad_dtype == p.dtype for p, home in zip(params, homes, strict=True)
        ]
        reference = weakref.ref(self)
        for index, param in enumerate(params):
            setattr(param, _TAKEN_BY, self._token)
            param.register_post_accumulate_grad_hook(_hook(reference, index))  # type: ignore[no-untyped-call]

    def accept(self, index: int) -> None:
        """Takes the gradient that autograd has just left in ``p.grad``.

        Raises:
            OptimizerError: it is sparse, or the window has been reduced already.
        """
        param, home = self._params[index], self._homes[index]
        if home is None or getattr(param, _TAKEN_BY, None) is not self._token:
            return  # nothing to train, or a later optimizer has taken the parameter over
        if self.phase is Phase.REDUCED:
            raise OptimizerError(
                "backward() ran after synchronize() had reduced this window's gradients: a window is reduced "
                "once; call step() or zero_grad() first, and synchronize() after the window's last backward()."
            )
        if self.phase is Phase.OVER:
            self.restart()
        self._take(param, home.grad_view(index), index)

    def collect(self) -> list[bool]:
        """Moves what stands in ``p.grad`` into the views; returns which parameters have a gradient here."""
        if self.phase is Phase.OVER:
            self.restart()
        for index, (param, home) in enumerate(zip(self._params, self._homes, strict=True)):
            if home is not None and param.grad is not None:
                self._take(param, home.grad_view(index), index)
        return [
            param.grad is not None if direct else received
            for param, direct, received in zip(self._params, self._direct, self.received, strict=True)
        ]

    def view(self, index: int) -> Tensor:
        """Where the gradient of parameter ``index`` accumulates, in its shape."""
        home = self._homes[index]
        return torch.zeros_like(self._params[index]) if home is None else home.grad_view(index)

    def zero(self, indices: list[int]) -> None:
        """Zeroes the views of parameters that got no gradient here."""
        for index in indices:
            home = self._homes[index]
            if home is not None:
                home.grad_view(index).zero_()

    def show(self, visible: bool) -> None:
        """Leaves the reduced gradients in ``p.grad`` (of the parameter's own dtype), or hides them all."""
        for index, param in enumerate(self._params):
            shown = visible and self._direct[index] and self.received[index]
            param.grad = self.view(index) if shown else None

    def restart(self) -> None:
        """Opens a new, empty window."""
        self.phase = Phase.OPEN
        self.received = [False] * len(self._params)

    def clear(self, set_to_none: bool) -> None:
        """``zero_grad``: forgets the gradients, or keeps those that are there as zeros."""
        kept = self.phase is Phase.OPEN and not set_to_none
        if kept:
            self.zero([i for i, has in enumerate(self.collect()) if has])
            return
        for param in self._params:
            param.grad = None
        self.restart()

    def _take(self, param: nn.Parameter, view: Tensor, index: int) -> None:
        grad = param.grad
        if grad is None:
            return
        if grad.layout is not torch.strided:
            raise OptimizerError(
                f"parameter {index} (shape {tuple(param.shape)}) got a sparse gradient: gradients are reduced in "
                "flat dense buffers; build its layer with sparse=False."
            )
        with torch.no_grad():
            if self._direct[index]:
                if grad is not view:
                    view.copy_(grad)
                    param.grad = view
                return
            if self.received[index]:
                view.add_(grad)
            else:
                view.copy_(grad)
        self.received[index] = True
        param.grad = None


def _hook(window: weakref.ref[Window], index: int) -> Callable[[Tensor], None]:
    """A hook that does not keep the window alive."""

    def accept(_: Tensor) -> None:
        alive = window()
        if alive is not None:
            alive.accept(index)

    return accept
