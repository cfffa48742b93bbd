"""From parameters and a mesh to buckets and their reducer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuron_lightning.backends import get_backend
from neuron_lightning.errors import OptimizerError
from neuron_lightning.optim.bucket import NARROW, Bucket
from neuron_lightning.optim.buckets import Run, check_spec, plan_buckets, runs_of
from neuron_lightning.optim.flat import FlatBucket
from neuron_lightning.optim.recorded import SliceBucket, WholeBucket
from neuron_lightning.optim.reduce import Reducer
from neuron_lightning.parallel.mesh import Mesh
from neuron_lightning.parallel.spec import get_spec, row_numel


def make_buckets(
    params: list[nn.Parameter],
    groups: Sequence[Mapping[str, Any]],
    mesh: Mesh,
    *,
    sharded: bool,
    master_weights: bool,
    fp32_grad_accumulation: bool,
    bucket_bytes: int,
) -> list[Bucket]:
    """Puts ``params`` into buckets, in order: one list of them for each dtype and device.

    Where graphs are recorded and the update is spread over ranks, also one for each parameter group and
    tensor-parallel treatment: a slice is updated as one tensor there.

    Raises:
        OptimizerError: a shard specification that does not cover its parameter.
    """
    ranks, rank = (mesh.sizes["dp"], mesh.coordinates["dp"]) if sharded else (1, 0)
    recorded = get_backend().records_graphs
    specs = [(get_spec(p, mesh.sizes["tp"]), row_numel(p)) for p in params]
    for param, (spec, row) in zip(params, specs, strict=True):
        check_spec(spec, param.shape, row)
    keys: list[tuple[Any, ...]] = [(p.dtype, p.device) for p in params]
    if recorded and ranks > 1:
        numbers = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
        treatments = [
            tuple(dict.fromkeys((part.replicas, part.grad_ranks) for part in s.parts)) for s, _ in specs
        ]
        keys = [(*key, numbers[id(p)], t) for key, p, t in zip(keys, params, treatments, strict=True)]
    buckets: list[Bucket] = []
    for key in dict.fromkeys(keys):
        narrow = key[0] in NARROW
        accumulation = torch.float32 if narrow and fp32_grad_accumulation else key[0]
        layouts = plan_buckets(
            [p.numel() if mine == key else 0 for p, mine in zip(params, keys, strict=True)],
            max_numel=max(1, bucket_bytes // accumulation.itemsize),
            num_slices=ranks,
        )
        for layout in layouts:
            runs = runs_of(layout.pieces(rank), specs)
            options: dict[str, Any] = {
                "accumulation_dtype": accumulation,
                "master": narrow and master_weights,
            }
            if not recorded:
                buckets.append(FlatBucket(layout, params, runs, rank=rank, whole=not sharded, **options))
            elif ranks > 1:
                if len(key[-1]) == 1:  # one treatment, also of a slice that holds nothing but padding
                    runs = [Run(*layout.slice_bounds(rank), *key[-1][0])]
                buckets.append(SliceBucket(layout, params, runs, rank=rank, **options))
            else:
                buckets.append(WholeBucket(layout, params, runs, **options))
    return buckets


def members_by_group(
    buckets: Sequence[Bucket], params: Sequence[nn.Parameter], groups: Sequence[Mapping[str, Any]]
) -> list[list[Tensor]]:
    """The tensors to update, by parameter group, in the order of the parameters.

    A unit that holds several parameters holds such of one group only.
    """
    numbers = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    units = [
        (unit.pieces[0].param if unit.pieces else bucket.layout.slots[0].param, unit)
        for bucket in buckets
        for unit in bucket.units
    ]
    members: list[list[Tensor]] = [[] for _ in groups]
    for index, unit in sorted(units, key=lambda found: found[0]):
        members[numbers[id(params[index])]].append(unit.tensor)
    return members


def make_reducer(
    params: list[nn.Parameter], buckets: Sequence[Bucket], mesh: Mesh, *, sharded: bool
) -> Reducer:
    """Reads from the specs of ``params`` over which ranks gradients are still partial.

    Every rank calls it together.
    """
    specs = [get_spec(p, mesh.sizes["tp"]) for p in params]
    sizes = {part.grad_ranks for spec in specs for part in spec.parts if part.grad_ranks > 1}
    return Reducer(mesh, buckets, subgroup_sizes=sorted(sizes), sharded=sharded)


def check_params(params: list[nn.Parameter]) -> None:
    """Checks that every parameter can live in a flat buffer.

    Raises:
        OptimizerError: one is on the meta device, sparse, or not of floating point.
    """
    for index, param in enumerate(params):
        if param.is_meta or param.layout is not torch.strided or not param.is_floating_point():
            raise OptimizerError(
                f"parameter {index} (shape {tuple(param.shape)}, {param.dtype}, {param.layout}, device "
                f"{param.device.type}) cannot be trained: parameters must be dense, of floating point and on a "
                "device; materialise a model that was built on the meta device before its optimizer is made."
            )
