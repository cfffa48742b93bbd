"""Number formats under Lightning's names, with the optimizer contract of sharded training.

``32-true``, ``bf16-mixed``, ``bf16-true``, ``16-mixed``, ``16-true`` and ``64-true`` mean on every backend what
they mean in Lightning. In a step the gradients are reduced before ``on_before_optimizer_step``, then unscaled,
clipped on the reduced shards, and applied.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer

from neuron_lightning.backends import Backend, get_backend
from neuron_lightning.errors import ConfigError

Name = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true"]
NAMES: tuple[str, ...] = get_args(Name)

_WEIGHTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_SCALED = ("16-mixed", "16-true")


class NeuronXLAPrecisionPlugin(Precision):
    """The precision plugin of :class:`~neuron_lightning.NeuronXLAStrategy`.

    Args:
        mixed_precision_enabled: NxD's argument; True means ``bf16-mixed``.
        precision: one of Lightning's names; default ``32-true``. ``Trainer(precision=…)`` does the same.
        scaler: initial settings for ``16-mixed`` and ``16-true``; its own methods are not used.

    Raises:
        ConfigError: an unknown name, the two arguments contradict each other, or a scaler without use.
    """

    def __init__(
        self,
        mixed_precision_enabled: bool = False,
        precision: Name | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if precision is not None and precision not in NAMES:
            raise ConfigError(f"unknown precision {precision!r}: it must be one of {', '.join(NAMES)}.")
        if mixed_precision_enabled and precision not in (None, "bf16-mixed"):
            raise ConfigError(
                f"mixed_precision_enabled=True means 'bf16-mixed', but precision is {precision!r}; pass one of them."
            )
        self.precision: Name = precision or ("bf16-mixed" if mixed_precision_enabled else "32-true")
        if scaler is not None and self.precision not in _SCALED:
            raise ConfigError(
                f"precision {self.precision!r} uses no scaler; it goes with {' and '.join(_SCALED)}."
            )
        self.scaler = ShardedGradScaler(scaler) if self.precision in _SCALED else None
        self._loss_was_scaled = False

    @classmethod
    def from_lightning(cls, plugin: Precision) -> NeuronXLAPrecisionPlugin:
        """The plugin of ours that means the same as one that ``Trainer(precision=…)`` made.

        Raises:
            ConfigError: a plugin of another kind.
        """
        if isinstance(plugin, cls):
            return plugin
        if type(plugin) not in (Precision, MixedPrecision, HalfPrecision, DoublePrecision):
            raise ConfigError(
                f"NeuronXLAStrategy cannot use the precision plugin {type(plugin).__name__}; use "
                f"Trainer(precision=…) with one of {', '.join(NAMES)}, or NeuronXLAPrecisionPlugin."
            )
        return cls(precision=plugin.precision, scaler=getattr(plugin, "scaler", None))  # type: ignore[arg-type]

    def check(self, backend: Backend) -> None:
        """Raises :class:`ConfigError` if ``backend`` cannot compute in this precision."""
        if self.precision == "64-true" and not backend.supports_float64:
            raise ConfigError(
                f"precision '64-true' needs 64-bit arithmetic, which {backend.name} devices lack; "
                "use '32-true', or run on cpu or cuda."
            )
        if self.precision in _SCALED and backend.name in ("neuron", "xla"):
            raise ConfigError(
                f"precision {self.precision!r} is refused on {backend.name}: its matrix engines are built for "
                "bfloat16, and a loss scaler synchronises with the host every step; use 'bf16-mixed' or 'bf16-true'."
            )

    # -- what modules and inputs are made of -----------------------------------------------------------

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Casts weights for the ``-true`` precisions other than 32."""
        dtype = _WEIGHTS.get(self.precision)
        return module if dtype is None else module.to(dtype=dtype)

    def convert_input(self, data: Any) -> Any:
        """Casts floating-point inputs to the weights' type."""
        dtype = _WEIGHTS.get(self.precision)
        if dtype is None:
            return data
        return apply_to_collection(data, Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Tensors made inside have the weights' type."""
        dtype = _WEIGHTS.get(self.precision)
        return nullcontext() if dtype is None else _default_dtype(dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        """As :meth:`tensor_init_context`."""
        return self.tensor_init_context()

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Autocast for the ``-mixed`` precisions, the default dtype for the others."""
        dtype = _AUTOCAST.get(self.precision)
        with get_backend().autocast(dtype) if dtype is not None else self.tensor_init_context():
            yield

    # -- backward and step -----------------------------------------------------------------------------

    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        """Scales the loss where a scaler is used, then runs Lightning's hooks."""
        if self.scaler is not None:
            tensor = self.scaler.scale(tensor)
            self._loss_was_scaled = True
        return super().pre_backward(tensor, module)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Backward (in the closure), reduction, unscaling, hooks and clipping, update; in this order.

        Raises:
            ConfigError: under a scaled precision, the gradients come from an unscaled ``loss.backward()``.
        """
        if self.scaler is None or not _is_ours(optimizer):
            return super().optimizer_step(optimizer, model, closure, **kwargs)
        result = closure()
        if result is None and model.automatic_optimization:
            return result
        if not self._loss_was_scaled:
            raise ConfigError(
                f"precision {self.precision!r} scales the loss, but backward ran on an unscaled one: call "
                "self.manual_backward(loss) instead of loss.backward(), or use 'bf16-mixed'."
            )
        self._loss_was_scaled = False
        self.scaler.unscale_(optimizer)
        self._after_closure(model, optimizer)
        output = self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        return output

    def _after_closure(self, model: LightningModule, optimizer: Any) -> None:
        if _is_ours(optimizer):
            optimizer.synchronize()
        super()._after_closure(model, optimizer)

    def _clip_gradients(self, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        guarded = _is_ours(optimizer) and optimizer.zero1
        own_hook = guarded and is_overridden("configure_gradient_clipping", model)
        with _gradients_guarded(optimizer) if own_hook else nullcontext():
            super()._clip_gradients(model, optimizer, *args, **kwargs)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clips by the global norm of the reduced gradients, each element counted once."""
        if _is_ours(optimizer):
            optimizer.clip_grad_norm(float(clip_val))  # type: ignore[attr-defined]
        else:
            super().clip_grad_by_norm(optimizer, clip_val)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clips every element of the reduced gradients."""
        if _is_ours(optimizer):
            optimizer.clip_grad_value(float(clip_val))  # type: ignore[attr-defined]
        else:
            super().clip_grad_by_value(optimizer, clip_val)

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state, where there is one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        if self.scaler is not None:
            self.scaler.load_state_dict(state_dict)


class ShardedGradScaler(torch.amp.GradScaler):
    """A loss scaler that unscales the reduced shards, and whose ranks skip the same steps.

    Args:
        settings: a scaler whose initial scale, factors and interval are taken over.
    """

    def __init__(self, settings: torch.amp.GradScaler | None = None) -> None:
        taken: dict[str, Any] = {}
        if settings is not None:
            taken = {
                "init_scale": settings.get_scale(),
                "growth_factor": settings.get_growth_factor(),
                "backoff_factor": settings.get_backoff_factor(),
                "growth_interval": settings.get_growth_interval(),
            }
        super().__init__(device=get_backend().device_type, **taken)

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        # The one method of torch's scaler that touches gradients (torch 2.9 to 2.13 call it from unscale_).
        optimizer.synchronize()
        found = optimizer.unscale(inv_scale)
        return {found.device: found}


class _ReducedGradient(Tensor):
    """Stands in for ``p.grad`` while user code runs that must not use it: any use is an error."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise ConfigError(
            "configure_gradient_clipping reads p.grad, but under ZeRO-1 no rank holds whole gradients: call "
            "self.clip_gradients(optimizer, gradient_clip_val=…, gradient_clip_algorithm=…), which clips the "
            "reduced shards; optimizer.full_grad(p) gathers one gradient (all ranks together)."
        )


@contextmanager
def _gradients_guarded(optimizer: Any) -> Iterator[None]:
    params = [
        p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.grad is None
    ]
    for p in params:
        p.grad = torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape).as_subclass(_ReducedGradient)
    try:
        yield
    finally:
        for p in params:
            p.grad = None


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _is_ours(optimizer: Any) -> bool:
    return hasattr(optimizer, "synchronize")
