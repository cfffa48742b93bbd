"""Activation checkpointing: recompute a block's forward in backward instead of keeping its activations."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from neuron_lightning.errors import ConfigError


def apply_activation_checkpointing(
    module: nn.Module, what: Literal["full"] | type[nn.Module] | tuple[type[nn.Module], ...]
) -> int:
    """Makes matching submodules recompute their forward in backward.

    Their classes are exchanged for checkpointing subclasses of the same name, so that parameter names,
    ``isinstance`` and copies stay as they are. Random operators, those inside ``get_rng_tracker().fork()``
    included, draw the same numbers again. In evaluation or without gradients nothing is recomputed.

    Args:
        module: the model, changed in place. Every rank must do the same.
        what: ``"full"``: every element of its (outermost) ``nn.ModuleList``s, which is where models keep their
            blocks; or the class, or classes, of the blocks.

    Returns:
        How many submodules were changed.

    Raises:
        ConfigError: nothing matches.
    """
    if what != "full" and not (isinstance(what, type | tuple)):
        raise ConfigError(
            f"activation_checkpoint_config must be None, 'full' or a module class, not {what!r}."
        )
    blocks = list(_list_elements(module) if what == "full" else _instances(module, what))
    if not blocks:
        present = sorted({type(m).__name__ for m in module.modules()})
        raise ConfigError(
            f"activation checkpointing of {what!r} matches nothing in {type(module).__name__}: 'full' needs an "
            f"nn.ModuleList of blocks, a class must occur; its module classes are {', '.join(present)}."
        )
    for block in blocks:
        block.__class__ = _checkpointing(type(block))  # type: ignore[arg-type]  # classes are hashable
    return len(blocks)


def _list_elements(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from child.children() if isinstance(child, nn.ModuleList) else _list_elements(child)


def _instances(
    module: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...]
) -> Iterator[nn.Module]:
    """Outermost instances: a block inside a block is recomputed with it."""
    for child in module.children():
        if isinstance(child, kinds):
            yield child
        else:
            yield from _instances(child, kinds)


@functools.cache
def _checkpointing(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``kind`` that recomputes; ``kind`` itself if it is one."""
    if getattr(kind, "_recomputes", False):
        return kind

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return kind.forward(self, *args, **kwargs)
        return checkpoint(functools.partial(kind.forward, self), *args, use_reentrant=False, **kwargs)

    functools.update_wrapper(forward, kind.forward)
    space = {"forward": forward, "_recomputes": True, "__module__": kind.__module__, "__doc__": kind.__doc__}
    subclass = type(kind.__name__, (kind,), space)
    subclass.__qualname__ = kind.__qualname__
    return subclass
