"""Initialisation that does not depend on the parallel layout.

A layer of this package records how each of its parameters is drawn. Outside :func:`deferred_init` it draws at
construction; inside, or on the ``meta`` device, :func:`materialize` does it later, by canonical name: TP=8
starts from exactly the weights of TP=1, with no communication, and no rank ever holds more than its share.

What is recognised as a plain normal, uniform or constant draw comes from a counter-based generator that
produces only the rank's slice. Any other ``init_method`` runs on the full global tensor, one parameter at a
time, from a seed made of the same name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuron_lightning.errors import ConfigError
from neuron_lightning.parallel.drawing import Distribution, fill_box, key_of, recognise, seeded
from neuron_lightning.parallel.move import move_parameter
from neuron_lightning.parallel.random import next_construction
from neuron_lightning.parallel.shards import fill_from_global, local_box
from neuron_lightning.parallel.spec import ShardPart, get_spec

InitMethod = Callable[[Tensor], object]
Replacements = dict[int, tuple[nn.Parameter, nn.Parameter]]
"""Old and new parameter by the id of the old one, which is kept alive so that its id stays its own."""

_RECORD = "init_record"
_UNDRAWN = "init_undrawn"
_deferred: ContextVar[bool] = ContextVar("neuron_lightning_deferred_init", default=False)


@dataclass(frozen=True, kw_only=True)
class Init:
    """How one parameter is drawn.

    Attributes:
        method: an in-place function as in ``torch.nn.init``; None: as ``torch.nn.Linear`` does.
        fan_in: global input size, for a parameter whose own shape does not show it (a bias).
        zero_rows: global rows that are set to zero afterwards (an embedding's ``padding_idx``).
    """

    method: InitMethod | None = None
    fan_in: int | None = None
    zero_rows: tuple[int, ...] = ()


@contextmanager
def deferred_init() -> Iterator[None]:
    """Context in which layers of this package allocate but do not draw; :func:`materialize` must follow."""
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


def is_undrawn(param: Tensor) -> bool:
    """Whether ``param`` still waits for :func:`materialize`."""
    return param.is_meta or bool(getattr(param, _UNDRAWN, False))


def mark_drawn(param: Tensor) -> None:
    """Says that ``param`` has its values (loaded weights, say): :func:`materialize` will not touch it."""
    setattr(param, _UNDRAWN, False)


def set_init(param: Tensor, init: Init) -> None:
    """Says how ``param`` is drawn, in place of what its layer said."""
    setattr(param, _RECORD, init)


def record(module: nn.Module, inits: Mapping[str, Init]) -> None:
    """Records how the parameters of a layer are drawn, and draws them unless that is deferred.

    A layer that draws by itself uses (seed, number of the layer since the seed was set); the seed is that of
    :func:`~neuron_lightning.parallel.random.model_parallel_manual_seed`, which starts the count again, or
    ``torch.initial_seed()``. torch's own generator is not advanced. All ranks must construct the same layers in the same order.

    Args:
        module: the layer, its parameters allocated and their specs attached.
        inits: by leaf name.
    """
    params = {leaf: module.get_parameter(leaf) for leaf in inits}
    for leaf, param in params.items():
        set_init(param, inits[leaf])
        setattr(param, _UNDRAWN, True)
    if _deferred.get() or any(param.is_meta for param in params.values()):
        return
    seed, number = next_construction()
    for leaf, param in params.items():
        _draw(param, seed, f"#{number}", leaf)


def materialize(
    module: nn.Module,
    seed: int,
    device: torch.device | str | None = None,
    *,
    param_init_fn: Callable[[nn.Module], object] | None = None,
) -> list[str]:
    """Draws every parameter that is undrawn or on ``meta``, by its canonical name, and nothing else.

    Parameters of layers that recorded an ``init_method`` are drawn slice by slice. Other modules with
    parameters or buffers on ``meta`` are filled by ``param_init_fn`` or their ``reset_parameters()``, on the
    CPU, from a seed made of their name; parameters of theirs that already hold values keep them. Tied
    parameters stay tied. Each rank works for itself; equal seeds on all ranks are up to the caller.

    Args:
        module: the model; changed in place.
        seed: seed of the whole model.
        device: where parameters that are on ``meta`` go; None: the device of the module's other parameters,
            else the CPU.
        param_init_fn: called with each module that is not of this package and has something on ``meta``.

    Returns:
        The names of the parameters that were drawn.

    Raises:
        ConfigError: something is on ``meta`` and nobody says how to fill it.
    """
    target = torch.device(device) if device is not None else _device_of(module)
    drawn: list[str] = []
    replacements: Replacements = {}
    for name, param in list(module.named_parameters()):
        if not is_undrawn(param) or not isinstance(getattr(param, _RECORD, None), Init):
            continue
        real = _allocate(param, target) if param.is_meta else param
        prefix, _, leaf = name.rpartition(".")
        _draw(real, seed, prefix, leaf)
        replacements[id(param)] = (param, real)
        drawn.append(name)
    _replace(module, replacements)
    for prefix, child in module.named_modules():
        drawn += _reset(child, prefix, seed, target, param_init_fn, replacements)
        _replace(module, replacements)
    _check_nothing_left(module)
    return drawn


def init_distribution(init: Init, global_shape: tuple[int, ...]) -> Distribution | None:
    """What ``init`` fills a global tensor with, or None if only its method can tell."""
    if init.method is not None:
        return recognise(init.method, global_shape)
    fan_in = init.fan_in if init.fan_in is not None else math.prod(global_shape[1:])
    bound = 1.0 / math.sqrt(fan_in) if fan_in > 0 else 0.0
    return Distribution("uniform", -bound, bound)


def _draw(param: Tensor, seed: int, prefix: str, leaf: str) -> None:
    """Fills a real parameter, all parts of it, padding with zeros."""
    init: Init = getattr(param, _RECORD)
    spec = get_spec(param, 1)
    if sum(math.prod(part.shape) for part in spec.parts) < param.numel():
        with torch.no_grad():
            param.zero_()
    for part in spec.parts:
        name = ".".join(piece for piece in (prefix, part.name or leaf) if piece)
        _draw_part(param.detach(), part, init, seed, name)
    mark_drawn(param)


def _draw_part(local: Tensor, part: ShardPart, init: Init, seed: int, name: str) -> None:
    box, key = local_box(local, part), key_of(seed, name)
    distribution = init_distribution(init, part.global_shape)
    if distribution is not None:
        fill_box(box, part.global_shape, part.global_offset, distribution, key)
    elif init.method is not None:
        full = torch.empty(part.global_shape, dtype=torch.float32, device="cpu")
        with seeded(key), torch.no_grad():
            init.method(full)
        box.copy_(full[tuple(slice(o, o + n) for o, n in zip(part.global_offset, part.shape, strict=True))])
    for row in init.zero_rows:
        if part.global_offset[0] <= row < part.global_offset[0] + part.shape[0]:
            box[row - part.global_offset[0]].zero_()


def _allocate(param: nn.Parameter, device: torch.device) -> nn.Parameter:
    """A real parameter in place of one on ``meta``, with all that was attached to it."""
    real = nn.Parameter(torch.empty_like(param, device=device), requires_grad=param.requires_grad)
    real.__dict__.update(param.__dict__)
    return real


def _replace(module: nn.Module, replacements: Replacements) -> None:
    for child in module.modules():
        for leaf, param in child._parameters.items():
            if param is not None and id(param) in replacements:
                child._parameters[leaf] = replacements[id(param)][1]


def _reset(
    child: nn.Module,
    prefix: str,
    seed: int,
    device: torch.device,
    param_init_fn: Callable[[nn.Module], object] | None,
    replacements: Replacements,
) -> list[str]:
    """Fills what a module that is not ours has on ``meta``; returns the names of the parameters filled."""
    own = dict(child.named_parameters(recurse=False))
    metas = {leaf: param for leaf, param in own.items() if param.is_meta}
    buffers = {leaf: b for leaf, b in child.named_buffers(recurse=False) if b.is_meta}
    fill = param_init_fn or (lambda m: m.reset_parameters() if callable(m.reset_parameters) else None)
    if not (metas or buffers) or (param_init_fn is None and not hasattr(child, "reset_parameters")):
        return []
    kept = {leaf: param.detach().clone() for leaf, param in own.items() if not param.is_meta}
    for leaf, param in metas.items():
        child._parameters[leaf] = real = _allocate(param, torch.device("cpu"))
        replacements[id(param)] = (param, real)
    for leaf, buffer in buffers.items():
        child._buffers[leaf] = torch.zeros_like(buffer, device="cpu")
    with seeded(key_of(seed, prefix)), torch.no_grad():
        fill(child)
        for leaf, values in kept.items():
            own[leaf].copy_(values)
    for param in metas.values():
        real = replacements[id(param)][1]
        move_parameter(real, device)
    for leaf in buffers:
        child._buffers[leaf] = child.get_buffer(leaf).to(device)
    return [f"{prefix}.{leaf}" if prefix else leaf for leaf in metas]


def _device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))


def _check_nothing_left(module: nn.Module) -> None:
    left = [name for name, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    if left:
        raise ConfigError(
            f"{len(left)} parameter(s) or buffer(s) are on the meta device and nothing says how to fill them: "
            f"{', '.join(left[:8])}{', …' if len(left) > 8 else ''}. Give their modules a reset_parameters() "
            "method, pass param_init_fn, load their weights first, or build them on a real device."
        )


def load_global(param: nn.Parameter, full: Callable[[ShardPart], Tensor]) -> None:
    """Fills a parameter with this rank's boxes of global tensors; it counts as drawn afterwards.

    Args:
        param: a real parameter of a layer of this package.
        full: returns the global tensor of a part (in any dtype, on any device).
    """
    fill_from_global(param.detach(), get_spec(param, 1), full)
    mark_drawn(param)
