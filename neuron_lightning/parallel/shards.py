"""How a global tensor is cut over tensor-parallel ranks: sizes, specs, and copying a rank's boxes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from neuron_lightning.errors import ConfigError
from neuron_lightning.parallel.spec import ShardPart, ShardSpec, set_spec


def extent_per_rank(size: int, ranks: int, *, pad: bool, what: str) -> int:
    """Size of one rank's slice of ``size``, rounded up where ``pad`` allows it.

    Raises:
        ConfigError: not divisible and not padded; ``what`` names the dimension in the message.
    """
    if size % ranks and not pad:
        raise ConfigError(
            f"{what} {size} is not divisible by the tensor-parallel size {ranks}: every rank holds an equal "
            f"slice; use pad=True (pads it to {-(-size // ranks) * ranks}), choose a multiple of {ranks}, or "
            "another tensor-parallel size."
        )
    return -(-size // ranks)


def row_part(
    *,
    name: str,
    global_shape: tuple[int, ...],
    per_rank: int,
    index: int,
    local_start: int = 0,
    replicas: int = 1,
) -> ShardPart:
    """Slice ``index`` of a global tensor cut along dimension 0 into slices of ``per_rank`` rows.

    Args:
        name: canonical leaf name, empty for the parameter's own.
        global_shape: unpadded global shape.
        per_rank: rows of every slice, padding included.
        index: which slice.
        local_start: first row of the slice in the local parameter.
        replicas: consecutive ranks that hold this same slice, each with a part of its gradient.
    """
    rows, rest = global_shape[0], global_shape[1:]
    start = min(index * per_rank, rows)
    zeros = (0,) * len(rest)
    return ShardPart(
        name=name,
        global_shape=global_shape,
        global_offset=(start, *zeros),
        shape=(min(per_rank, rows - start), *rest),
        local_offset=(local_start, *zeros),
        local_rows=per_rank,
        replicas=replicas,
        grad_ranks=replicas,
    )


def column_part(*, global_shape: tuple[int, int], per_rank: int, index: int) -> ShardPart:
    """Slice ``index`` of a global matrix cut along dimension 1 into slices of ``per_rank`` columns."""
    rows, columns = global_shape
    start = min(index * per_rank, columns)
    return ShardPart(
        global_shape=global_shape,
        global_offset=(0, start),
        shape=(rows, min(per_rank, columns - start)),
        local_offset=(0, 0),
        local_rows=rows,
    )


def mark_sharded(param: nn.Parameter, parts: list[ShardPart], *, dim: int, stride: int, ranks: int) -> None:
    """Attaches the spec and NxD's attributes to a sharded parameter."""
    set_spec(param, ShardSpec(parts=tuple(parts)))
    param.tensor_model_parallel = True  # type: ignore[attr-defined]
    param.partition_dim = dim  # type: ignore[attr-defined]
    param.partition_stride = stride  # type: ignore[attr-defined]
    param.num_partitions = ranks  # type: ignore[attr-defined]


def padding_runs(parts: list[ShardPart], dim: int, extent: int) -> tuple[tuple[int, int], ...]:
    """(start, length) of the runs along ``dim`` of a local parameter that belong to no global element."""
    if dim == 1:
        width = parts[0].shape[1]
        return ((width, extent - width),) if width < extent else ()
    return tuple(
        (part.local_offset[0] + part.shape[0], part.local_rows - part.shape[0])
        for part in parts
        if part.shape[0] < part.local_rows
    )


def local_box(local: Tensor, part: ShardPart) -> Tensor:
    """The view of a local parameter that holds ``part``, padding left out."""
    return narrow_box(local, part.local_offset, part.shape)


def global_box(full: Tensor, part: ShardPart) -> Tensor:
    """The view of a global tensor that ``part`` is."""
    return narrow_box(full, part.global_offset, part.shape)


def narrow_box(tensor: Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The view of ``tensor`` of the given shape that starts at ``offset``."""
    for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def fill_from_global(local: Tensor, spec: ShardSpec, full: Callable[[ShardPart], Tensor]) -> None:
    """Fills a local parameter with its boxes of the global tensors and zeroes its padding.

    Args:
        local: the local parameter, overwritten.
        spec: its parts.
        full: returns the global tensor of a part.
    """
    with torch.no_grad():
        if sum(part.shape[0] * (part.shape[1] if len(part.shape) > 1 else 1) for part in spec.parts) < (
            local.shape[0] * (local.shape[1] if local.dim() > 1 else 1)
        ):
            local.zero_()
        for part in spec.parts:
            local_box(local, part).copy_(global_box(full(part), part))
