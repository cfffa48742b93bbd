"""From parameters and a mesh to flat buckets and their reducer."""

from __future__ import annotations

import torch
from torch import nn

from neuron_lightning.errors import OptimizerError
from neuron_lightning.optim.buckets import check_spec, plan_buckets, runs_of
from neuron_lightning.optim.flat import NARROW, FlatBucket
from neuron_lightning.optim.reduce import Reducer
from neuron_lightning.parallel.mesh import Mesh
from neuron_lightning.parallel.spec import get_spec, row_numel


def make_buckets(
    params: list[nn.Parameter],
    mesh: Mesh,
    *,
    sharded: bool,
    master_weights: bool,
    fp32_grad_accumulation: bool,
    bucket_bytes: int,
) -> list[FlatBucket]:
    """Moves ``params`` into buckets, one list of them for each dtype and device, in order."""
    buckets = []
    for dtype, device in dict.fromkeys((p.dtype, p.device) for p in params):
        narrow = dtype in NARROW
        accumulation = torch.float32 if narrow and fp32_grad_accumulation else dtype
        layouts = plan_buckets(
            [p.numel() if (p.dtype, p.device) == (dtype, device) else 0 for p in params],
            max_numel=max(1, bucket_bytes // accumulation.itemsize),
            num_slices=mesh.sizes["dp"] if sharded else 1,
        )
        buckets += [
            FlatBucket(
                layout,
                params,
                accumulation_dtype=accumulation,
                rank=mesh.coordinates["dp"] if sharded else 0,
                master=narrow and master_weights,
                whole=not sharded,
            )
            for layout in layouts
        ]
    return buckets


def make_reducer(
    params: list[nn.Parameter], buckets: list[FlatBucket], mesh: Mesh, *, sharded: bool
) -> Reducer:
    """Reads from the specs of ``params`` what is still partial and what is held more than once.

    Every rank calls it together.
    """
    specs = [(get_spec(p, mesh.sizes["tp"]), row_numel(p)) for p in params]
    for param, (spec, row) in zip(params, specs, strict=True):
        check_spec(spec, param.shape, row)
    sizes = {part.grad_ranks for spec, _ in specs for part in spec.parts if part.grad_ranks > 1}
    return Reducer(
        mesh,
        buckets,
        [runs_of([piece.where for piece in bucket.pieces], specs) for bucket in buckets],
        subgroup_sizes=sorted(sizes),
        sharded=sharded,
    )


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
