"""``initialize_parallel_model``: from a function that builds a model to this rank's share of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from neuron_lightning.backends import get_backend
from neuron_lightning.config import NeuronConfig
from neuron_lightning.errors import ConfigError
from neuron_lightning.lightning.model_setup import mark_drawn_alike, model_seed
from neuron_lightning.parallel.activation_checkpoint import apply_activation_checkpointing
from neuron_lightning.parallel.initialize import deferred_init, materialize


def initialize_parallel_model(
    nxd_config: Mapping[str, Any],
    model_fn: Callable[..., nn.Module],
    include_buffers: bool = False,
    *model_args: Any,
    **model_kwargs: Any,
) -> nn.Module:
    """Builds the model and draws this rank's slices of its weights. Every rank calls it together.

    Starting weights depend on the seed alone, not on the parallel layout.

    Args:
        nxd_config: the configuration; its ``model_init_config`` and ``activation_checkpoint_config`` apply.
        model_fn: called with the remaining arguments; a class or a function that returns the model.
        include_buffers: accepted for NxD's scripts: buffers always go where the parameters go.
        *model_args: for ``model_fn``.
        **model_kwargs: for ``model_fn``.

    Returns:
        The model itself. ``model.module`` is the same object, for scripts that expect NxD's wrapper.

    Raises:
        ConfigError: ``model_fn`` returns no module, or a weight that nothing can draw.
    """
    config = NeuronConfig.from_any(nxd_config)
    init = config.model_init_config
    on_meta = torch.device("meta") if init.meta_device_init else nullcontext()
    with deferred_init(), on_meta:
        model: Any = model_fn(*model_args, **model_kwargs)
    if not isinstance(model, nn.Module):
        name = getattr(model_fn, "__qualname__", repr(model_fn))
        raise ConfigError(
            f"model_fn must return a torch.nn.Module, but {name} returned {type(model).__name__}; "
            "pass the model's class or a function that ends in `return model`."
        )
    device = get_backend().current_device()
    fill = init.param_init_fn
    fill_module = None if fill is None else lambda module: fill(module, torch.device("cpu"))
    names = materialize(
        model, model_seed(), device if init.meta_device_init else None, param_init_fn=fill_module
    )
    mark_drawn_alike(model, names)
    recompute: Any = config.activation_checkpoint_config  # "full" or a class; the config has checked it
    if recompute is not None:
        apply_activation_checkpointing(model, recompute)
    if not hasattr(model, "module"):
        object.__setattr__(model, "module", model)  # not registered: no new names, no cycle for torch
    built: nn.Module = model
    return built
