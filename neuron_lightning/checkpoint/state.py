"""Local state described as boxes of global tensors: what this rank could write, and where loaded boxes go."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor, nn

from neuron_lightning.checkpoint import boxes, tensor_file
from neuron_lightning.checkpoint.boxes import Box, Holding
from neuron_lightning.errors import CheckpointError

GROUP_CHOICES = ("params", "fused", "foreach", "capturable", "differentiable")
"""Keys of a parameter group that say how to compute, not what: they stay as the running optimizer has them."""


class ParamState(Protocol):
    """State of the flat range of one parameter that this rank owns; a dataclass."""

    @property
    def param(self) -> Tensor: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def tensors(self) -> Mapping[str, Tensor]: ...
    @property
    def scalars(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Source:
    """A box that this rank holds.

    Attributes:
        name: of the global tensor, with its ``model/`` or ``optimizer.N/`` prefix.
        global_shape: shape of the global tensor.
        box: the elements.
        tensor: they themselves, a view of local memory.
        spread: whether any holder may write it (otherwise the lowest rank's counts).
    """

    name: str
    global_shape: tuple[int, ...]
    box: Box
    tensor: Tensor
    spread: bool = True

    @property
    def kind(self) -> str:
        """Which kind of file it belongs into."""
        return "model" if self.name.startswith("model/") else "optimizer"

    @property
    def holding(self) -> Holding:
        """What the other ranks need to know of it."""
        return Holding(self.name, self.box, self.tensor.element_size(), self.spread)


@dataclass
class LocalState:
    """All that this rank could write, besides trainer and rank state.

    Attributes:
        sources: the boxes.
        aliases: name of a tied tensor to the name under which it is stored.
        scalars: numbers of optimizers' state by owner, such as ``optimizer.0/<parameter>``.
        owners: for each optimizer the owners of each of its pieces.
        where: equal for two states whose tensors are the same memory under the same names.
    """

    sources: list[Source] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    scalars: dict[str, dict[str, float]] = field(default_factory=dict)
    owners: list[list[list[str]]] = field(default_factory=list)
    where: Any = None


def describe(
    modules: Mapping[str, Mapping[str, Tensor]],
    optimizers: Sequence[Any],
    parameters: Mapping[str, nn.Parameter],
    tp_size: int,
    known: LocalState | None = None,
) -> LocalState:
    """Describes what this rank holds as boxes.

    Args:
        modules: tensors by prefix and name: the module's own under ``model``, averages under theirs.
        optimizers: the optimizers, in order.
        parameters: the module's parameters by name.
        tp_size: tensor-parallel size.
        known: an earlier description; where every tensor is still the same memory, it is not worked out again, and
            its very ``sources`` come back.

    Raises:
        CheckpointError: something that cannot be stored.
    """
    pieces = [export(optimizer) for optimizer in optimizers]
    where = _where(modules, pieces, parameters, tp_size)
    if known is not None and known.where == where:
        local = LocalState(known.sources, known.aliases, {}, known.owners, where)
    else:
        local = LocalState(where=where)
        names = Names(parameters)
        for prefix, tensors in modules.items():
            _add_module(local, tensors, names, tp_size, prefix)
        for index, of_one in enumerate(pieces):
            local.owners.append([_add_piece(local, index, piece, names, tp_size) for piece in of_one])
    for owners_of_one, of_one in zip(local.owners, pieces, strict=True):
        for owners, piece in zip(owners_of_one, of_one, strict=True):
            for owner in owners:
                local.scalars.setdefault(owner, {}).update({k: float(v) for k, v in piece.scalars.items()})
    return local


def _where(
    modules: Mapping[str, Mapping[str, Tensor]],
    pieces: Sequence[Sequence[ParamState]],
    parameters: Mapping[str, nn.Parameter],
    tp_size: int,
) -> Any:
    """Memory and name of everything. (Sources hold their tensors, so that memory seen before cannot be another's.)"""
    own = [(name, id(p)) for name, p in parameters.items()]
    held = [
        (prefix, name, _memory(tensor))
        for prefix, tensors in modules.items()
        for name, tensor in tensors.items()
    ]
    updated = [
        [(id(p.param), p.start, p.stop, [(k, _memory(t)) for k, t in p.tensors.items()]) for p in of_one]
        for of_one in pieces
    ]
    return tp_size, own, held, updated


def _memory(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor):
        return None
    return storage_key(tensor) or (tensor.device, tuple(tensor.shape), tensor.dtype)


def storage_key(tensor: Tensor) -> tuple[Any, ...] | None:
    """Equal for two tensors that are the same memory; None where there is none to compare."""
    if not tensor.numel() or tensor.is_meta:
        return None
    storage = tensor.untyped_storage()
    return (
        tensor.device,
        # XLA's tensors have no address, but a storage of their own each.
        storage._cdata if tensor.device.type == "xla" else storage.data_ptr(),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


def average_prefix(key: str) -> str:
    """Where a further set of the module's weights is stored. Raises :class:`CheckpointError` for an unusable key."""
    if not re.fullmatch(r"\w+", key):
        raise CheckpointError(f"a set of averaged weights is named by letters, digits and _, not {key!r}.")
    return f"average.{key}"


class Names:
    """Finds the parameter (with its shard spec) behind an entry of a state dict, and a parameter's name."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._by_name = dict(parameters)
        self._name_by_id = {id(p): name for name, p in reversed(list(parameters.items()))}

    @cached_property
    def _by_storage(self) -> dict[Any, nn.Parameter]:
        return {key: p for p in self._by_name.values() if (key := storage_key(p)) is not None}

    def parameter(self, name: str, tensor: Tensor) -> nn.Parameter | None:
        """The parameter that ``tensor`` is; None for a buffer."""
        if name in self._by_name:
            return self._by_name[name]
        key = storage_key(tensor)
        return None if key is None else self._by_storage.get(key)

    def name_of(self, param: Tensor) -> str:
        """Name of a parameter. Raises :class:`CheckpointError` if the module does not have it."""
        if id(param) not in self._name_by_id:
            raise CheckpointError(
                f"an optimizer holds a parameter of shape {tuple(param.shape)} that the module does not: a checkpoint "
                "names optimizer state after the module's parameters; register it in the module."
            )
        return self._name_by_id[id(param)]


def tied_groups(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of a state dict, those of the same memory together, in order."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"the module's state {name!r} is a {type(tensor).__name__}, not a tensor: state dicts hold tensors only "
                "(get_extra_state() must return one)."
            )
        groups.setdefault(storage_key(tensor) or name, []).append(name)
    return list(groups.values())


def _add_module(
    state: LocalState, tensors: Mapping[str, Tensor], names: Names, tp_size: int, prefix: str
) -> None:
    """Adds weights and buffers under a prefix; tied ones are stored once and aliased."""
    for group in tied_groups(tensors):
        first, tensor = group[0], tensors[group[0]].detach()
        param = names.parameter(first, tensor)
        described = param if param is not None else tensor
        for place in boxes.placements(first, described, tp_size):
            tensor_file.checked_dtype(first, tensor.dtype)
            source = Source(
                f"{prefix}/{place.name}",
                place.global_shape,
                place.box,
                boxes.view(tensor, place.local),
                spread=param is not None,
            )
            state.sources.append(source)
        for other in group[1:]:
            _add_aliases(state, first, other, described, tp_size, prefix)


def _add_aliases(state: LocalState, first: str, other: str, param: Tensor, tp_size: int, prefix: str) -> None:
    pairs = zip(boxes.placements(first, param, tp_size), boxes.placements(other, param, tp_size), strict=True)
    for stored, alias in pairs:
        state.aliases[f"{prefix}/{alias.name}"] = f"{prefix}/{stored.name}"


def _add_piece(state: LocalState, index: int, piece: ParamState, names: Names, tp_size: int) -> list[str]:
    """Adds a piece of an optimizer's state under ``optimizer.<index>/``. Returns the owners of its numbers."""
    name, shape = names.name_of(piece.param), tuple(piece.param.shape)
    owners = []
    for place in boxes.flat_placements(name, piece.param, tp_size, piece.start, piece.stop):
        owners.append(f"optimizer.{index}/{place.name}")
        for key, flat in piece.tensors.items():
            check_piece(name, key, flat, piece)
            tensor = boxes.flat_view(flat.detach(), piece.start, shape, place.local)
            state.sources.append(Source(f"{owners[-1]}/{key}", place.global_shape, place.box, tensor))
    return owners


def export(optimizer: Any) -> Sequence[ParamState]:
    """The pieces of an optimizer. Raises :class:`CheckpointError` if it is not one that can list them."""
    if not hasattr(optimizer, "export_state"):
        raise CheckpointError(
            f"{type(optimizer).__name__} cannot be saved by itself: let the strategy wrap it (configure_optimizers), or "
            "make it with initialize_parallel_optimizer."
        )
    pieces: Sequence[ParamState] = optimizer.export_state()
    return pieces


def check_piece(name: str, key: str, flat: Tensor, piece: ParamState) -> None:
    """Checks that a state tensor has one element for each of the parameter's in the piece."""
    tensor_file.checked_dtype(name, flat.dtype)
    if flat.dim() != 1 or flat.numel() != piece.stop - piece.start or not flat.is_contiguous():
        raise CheckpointError(
            f"optimizer state {key!r} of {name} has shape {tuple(flat.shape)}; state is stored element by element, flat, "
            f"and this piece has {piece.stop - piece.start} elements: an optimizer whose state has another shape "
            "(Adafactor, LBFGS) cannot be saved topology-free; train it with weights-only checkpoints."
        )


def group_options(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Hyper-parameters and parameter names of an optimizer's groups."""
    names = Names(parameters)
    return [
        {
            "options": {key: value for key, value in group.items() if key not in GROUP_CHOICES},
            "params": [names.name_of(p) for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]
