"""The optimizer that Lightning, schedulers and users see: any torch optimizer, data parallel or under ZeRO-1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, overload

from torch import Tensor, nn
from torch.optim import Optimizer

from neuron_lightning.errors import OptimizerError
from neuron_lightning.optim.engine import Engine
from neuron_lightning.optim.local_state import load_local_state, local_state
from neuron_lightning.optim.state import ParamState

DEFAULT_BUCKET_BYTES = 64 * 2**20
"""Gradient bytes of a bucket: large enough for full bandwidth, small enough that one more copy does not matter."""


class ParallelOptimizer(Optimizer):
    """Drives a torch optimizer over a parallel layout: reduces gradients, clips, updates, shares the weights.

    The weights of all trainable parameters move into flat buffers (the Parameter objects stay). Gradients
    accumulate by hook. A step reduces them once, computes the norm of the whole model once, clips if
    configured, and runs the user's optimizer class: on whole parameters on every rank, or, with ZeRO-1
    (Rajbhandari et al. 2020), each data-parallel rank on its slice, followed by an all-gather.

    It behaves as torch's own classes do, with these differences: ``p.grad`` is None after ``step()`` (the step
    consumes the gradients) and, under ZeRO-1, already after ``synchronize()``; weights may change only in
    place, followed by :meth:`reload_master_weights`; gradients that the window accumulates in fp32 are
    forgotten by this optimizer's ``zero_grad()``, not by the module's.

    ``synchronize``, ``clip_grad_*``, ``unscale``, ``step`` and ``full_grad`` are called by every rank together.

    Args:
        optimizer: the user's instance. Its ``param_groups`` stay the ones that schedulers write into; its
            state, if it has any, is taken over.
        zero1: spread optimizer state and update over the data-parallel ranks.
        max_grad_norm: clip the global norm to this in every step; None: only when ``clip_grad_*`` is called.
        master_weights: update fp32 copies of parameters that are narrower than fp32.
        fp32_grad_accumulation: accumulate and reduce gradients of such parameters in fp32.
        bucket_bytes: gradient bytes of one flat buffer.

    Raises:
        OptimizerError: the class is not element-wise but would update pieces of parameters; a parameter is on
            the meta device, sparse or not floating point; a setting makes no sense.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        zero1: bool,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        fp32_grad_accumulation: bool = False,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    ) -> None:
        _check_arguments(optimizer, max_grad_norm, bucket_bytes)
        engine = Engine(
            optimizer,
            zero1=zero1,
            max_grad_norm=max_grad_norm,
            master_weights=master_weights,
            fp32_grad_accumulation=fp32_grad_accumulation,
            bucket_bytes=bucket_bytes,
        )
        # Hooks that were, or will be, registered on the user's instance run around this one's step.
        hooks = {name: value for name, value in vars(optimizer).items() if name.startswith("_optimizer_")}
        Optimizer.__setstate__(self, {"_engine": engine, **hooks})

    _engine: Engine

    # -- what torch's optimizers have ----------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The user's parameter groups, the very list."""
        return self._engine.outer.param_groups

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The user's default hyper-parameters."""
        return self._engine.outer.defaults

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """State by updated tensor: flat pieces under ZeRO-1, else parameters (or their master copies)."""
        return self._engine.state

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Reduces (if nobody has), clips as configured (if nobody has), updates, and shares the weights.

        Args:
            closure: evaluated first, with gradients enabled.

        Returns:
            What ``closure`` returned.
        """
        return self._engine.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients and opens a new window; the flat buffers stay."""
        self._engine.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not possible once wrapped.

        Raises:
            OptimizerError: always.
        """
        raise OptimizerError(
            f"add_param_group() with {len(list(param_group.get('params', [])))} parameter(s): parameter groups "
            "are fixed once the optimizer is wrapped, because its flat buffers are laid out once; pass all "
            "groups to the constructor, with lr=0 for those that start later."
        )

    def state_dict(self) -> dict[str, Any]:
        """This rank's share, for the same layout only; checkpoints use :meth:`export_state`."""
        return local_state(self._engine)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned on this rank.

        Raises:
            OptimizerError: it was written under another layout.
        """
        load_local_state(self._engine, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        raise OptimizerError(
            "a parallel optimizer cannot be copied or pickled: its parameters live in its flat buffers; save "
            "state_dict() or a checkpoint."
        )

    # -- what this one adds --------------------------------------------------------------------------------

    @property
    def optimizer(self) -> Optimizer:
        """The user's instance."""
        return self._engine.outer

    @property
    def zero1(self) -> bool:
        """Whether the update is spread over the data-parallel ranks."""
        return self._engine.zero1

    @property
    def max_grad_norm(self) -> float | None:
        """Norm that every step clips to; None for no clipping."""
        return self._engine.max_grad_norm

    @property
    def grad_norm(self) -> Tensor | None:
        """Global norm before clipping, of the last reduced window: a 0-d device tensor; None before the first."""
        return self._engine.grad_norm

    def synchronize(self) -> None:
        """Reduces the gradients of the window; nothing happens if that has been done."""
        self._engine.synchronize()

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Clips the global norm now, in place of the configured clipping.

        Returns:
            The norm before clipping, a 0-d device tensor.
        """
        return self._engine.clip_grad_norm(max_norm)

    def clip_grad_value(self, clip_value: float) -> None:
        """Clips every element to ``[-clip_value, clip_value]`` now, in place of the configured clipping."""
        self._engine.clip_grad_value(float(clip_value))

    def unscale(self, inv_scale: Tensor) -> Tensor:
        """Multiplies the reduced gradients by ``inv_scale``, for gradient scalers.

        Returns:
            0-d fp32 device tensor, the same on every rank: 1.0 if any gradient is infinite or NaN, else 0.0.
        """
        return self._engine.unscale(inv_scale)

    def full_grad(self, param: nn.Parameter) -> Tensor | None:
        """The averaged gradient of ``param``, in its local shape and the accumulation dtype (a copy).

        Readable from ``synchronize()`` (called here if need be) until the next backward or ``zero_grad()``.

        Returns:
            None if no data-parallel rank had a gradient for it.
        """
        return self._engine.full_grad(param)

    def reload_master_weights(self) -> None:
        """To be called after weights were changed in place, e.g. loaded: takes fp32 copies from them again."""
        self._engine.reload_master_weights()

    def held_tensors(self) -> list[Tensor]:
        """The device tensors that :meth:`export_state` reads, for who fetches them all at once."""
        return self._engine.held_tensors()

    def export_state(self, copies: Mapping[int, Tensor] | None = None) -> list[ParamState]:
        """The state of every piece that this rank updates (for the ranges alone, before the first step).

        Args:
            copies: host copies of :meth:`held_tensors`, by ``id`` of the tensor, to read in their place.
        """
        return self._engine.export_state(copies or {})

    def import_state(self, states: list[ParamState]) -> None:
        """Replaces the state of the given pieces; their ranges are those of :meth:`export_state`.

        Raises:
            OptimizerError: a range that this rank does not update, or a tensor of another length.
        """
        self._engine.import_state(states)


def _check_arguments(optimizer: Optimizer, max_grad_norm: float | None, bucket_bytes: int) -> None:
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, ParallelOptimizer):
        raise OptimizerError(
            f"ParallelOptimizer wraps a torch.optim.Optimizer instance, not a {type(optimizer).__name__}; make "
            "the optimizer of the model's parameters first."
        )
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise OptimizerError(f"max_grad_norm must be positive, or None for no clipping, not {max_grad_norm}.")
    if bucket_bytes < 1:
        raise OptimizerError(f"bucket_bytes must be positive, not {bucket_bytes}.")
