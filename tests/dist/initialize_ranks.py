"""What the ranks run in the tests of initialisation: models whose slices are compared with those of one rank."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from neuron_lightning.parallel import (
    ColumnParallelLinear,
    GQAQKVColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    deferred_init,
    materialize,
    model_parallel_manual_seed,
)
from neuron_lightning.parallel import mesh as mesh_module
from neuron_lightning.parallel.shards import local_box
from neuron_lightning.parallel.spec import get_spec
from tests.devices import layout

_small = functools.partial(nn.init.normal_, std=0.02)


class Zoo(nn.Module):
    """One of everything that can be cut."""

    def __init__(self, tp: int, device: str | None, dtype: torch.dtype) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.embed = ParallelEmbedding(13, 6, padding_idx=-1, pad=True, init_method=_small, **kind)
        self.across = ParallelEmbedding(13, 7, shard_across_embedding=True, pad=True, **kind)
        self.qkv = GQAQKVColumnParallelLinear(6, [16, 4], kv_size_multiplier=max(1, tp // 2), **kind)
        self.unfused = GQAQKVColumnParallelLinear(6, [8, 8], fuse_qkv=False, **kind)
        self.gate_up = ColumnParallelLinear(6, 18, stride=2, pad=True, init_method=_small, **kind)
        self.down = RowParallelLinear(9, 5, pad=True, init_method=nn.init.xavier_normal_, **kind)
        self.opaque = RowParallelLinear(8, 4, init_method=nn.init.orthogonal_, **kind)
        self.odd = ColumnParallelLinear(3, 1, pad=True, init_method=nn.init.kaiming_uniform_, **kind)
        self.norm = nn.LayerNorm(6, **kind)
        self.plain = nn.Linear(6, 3, **kind)


def boxes(tp: int, how: str, dtype: torch.dtype = torch.float32) -> dict[str, list[tuple]]:
    """Name -> (global offset, values) of everything that this rank holds."""
    with layout(tp):
        before = torch.get_rng_state()
        model = build(tp, how, dtype)
        if how != "meta":  # a plain torch layer among them draws from torch's generator
            return collect(model, ours_only=True)
        assert torch.equal(before, torch.get_rng_state())
        return collect(model)


def build(tp: int, how: str, dtype: torch.dtype) -> Zoo:
    if how == "alone":
        model_parallel_manual_seed(5)
        return Zoo(tp, None, dtype)
    with deferred_init():
        model = Zoo(tp, "meta" if how == "meta" else None, dtype)
    drawn = materialize(model, seed=5)
    everything = {name for name, _ in model.named_parameters()}
    plain = {"norm.weight", "norm.bias", "plain.weight", "plain.bias"}
    assert set(drawn) == (everything if how == "meta" else everything - plain)
    assert materialize(model, seed=6) == []
    return model


def collect(model: nn.Module, ours_only: bool = False) -> dict[str, list[tuple]]:
    found: dict[str, list[tuple]] = {}
    for name, param in model.named_parameters():
        if ours_only and name.startswith(("norm", "plain")):
            continue
        prefix, _, leaf = name.rpartition(".")
        covered = torch.zeros_like(param, dtype=torch.bool)
        for part in get_spec(param, mesh_module.current().sizes["tp"]).parts:
            values = local_box(param.detach(), part)
            local_box(covered, part).fill_(True)
            found.setdefault(f"{prefix}.{part.name or leaf}", []).append(
                (part.global_shape, part.global_offset, values.clone())
            )
        assert not param[~covered].any(), f"{name}: padding is not zero"
    return found


def assemble(per_rank: list[dict[str, list[tuple]]]) -> dict[str, Tensor]:
    """Global tensors from the ranks' boxes; boxes that overlap must agree."""
    whole: dict[str, Tensor] = {}
    for found in per_rank:
        for name, items in found.items():
            for shape, offset, values in items:
                full = whole.setdefault(name, torch.full(shape, float("nan"), dtype=values.dtype))
                where = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
                known = ~full[where].isnan()
                assert torch.equal(full[where][known], values[known]), f"{name}: replicas differ"
                full[where] = values
    for name, full in whole.items():
        assert not full.isnan().any(), f"{name} has holes"
    return whole
