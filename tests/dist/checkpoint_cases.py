"""What the ranks of the checkpoint tests run: a small sharded model whose global contents are known."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint import boxes, points
from neuron_lightning.errors import CheckpointError
from neuron_lightning.optim import ParallelOptimizer
from neuron_lightning.parallel import mesh
from neuron_lightning.parallel.spec import ShardPart, ShardSpec, set_spec
from tests.devices import layout

GLOBAL_SHAPES = {
    "embed.weight": (10, 4),
    "attn.weight_q": (8, 4),
    "attn.weight_k": (4, 4),
    "attn.weight_v": (4, 4),
    "row.weight": (4, 8),
    "norm.weight": (4,),
}
KV_HEADS = 2
PADDING = -7.0


def reference(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The global tensors by canonical name."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in GLOBAL_SHAPES.items()}


def rows(offset: int, count: int, width: int) -> dict[str, tuple[int, ...]]:
    return {"global_offset": (offset, 0), "shape": (count, width)}


def specs(tp: int, rank: int) -> dict[str, tuple[tuple[int, ...], ShardSpec]]:
    """Local shape and shard spec of each sharded parameter on a tensor-parallel rank."""
    per_rank = -(-10 // tp)
    held = max(0, min(per_rank, 10 - rank * per_rank))
    embed = ShardPart(
        global_shape=(10, 4),
        **rows(min(10, rank * per_rank), held, 4),
        local_offset=(0, 0),
        local_rows=per_rank,
    )
    q = 8 // tp
    replicas = max(1, tp // KV_HEADS)
    kv = 4 // min(tp, KV_HEADS)
    parts = [
        ShardPart(
            name="weight_q", global_shape=(8, 4), **rows(rank * q, q, 4), local_offset=(0, 0), local_rows=q
        )
    ]
    for i, name in enumerate(("weight_k", "weight_v")):
        part = ShardPart(
            name=name,
            global_shape=(4, 4),
            **rows(rank // replicas * kv, kv, 4),
            local_offset=(q + i * kv, 0),
            local_rows=kv,
            replicas=replicas,
        )
        parts.append(part)
    columns = 8 // tp
    row = ShardPart(
        global_shape=(4, 8),
        global_offset=(0, rank * columns),
        shape=(4, columns),
        local_offset=(0, 0),
        local_rows=4,
    )
    return {
        "embed.weight": ((per_rank, 4), ShardSpec(parts=(embed,))),
        "attn.weight_qkv": ((q + 2 * kv, 4), ShardSpec(parts=tuple(parts))),
        "row.weight": ((4, columns), ShardSpec(parts=(row,))),
    }


def local_tensors(values: Mapping[str, Tensor], padding: float = PADDING) -> dict[str, Tensor]:
    """This rank's local tensors of global ``values``; padding is filled with a mark."""
    layout = mesh.current()
    dtype = values["norm.weight"].dtype
    found = {"norm.weight": values["norm.weight"].clone()}
    for name, (shape, spec) in specs(layout.sizes["tp"], layout.coordinates["tp"]).items():
        local = torch.full(shape, padding, dtype=dtype)
        param = nn.Parameter(local.clone())
        set_spec(param, spec)
        for place in boxes.placements(name, param, layout.sizes["tp"]):
            boxes.view(local, place.local).copy_(boxes.view(values[place.name], place.box))
        found[name] = local
    return found


class Sharded(nn.Module):
    """The model of :data:`GLOBAL_SHAPES` on this rank, plus a buffer."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        layout = mesh.current()
        layers = specs(layout.sizes["tp"], layout.coordinates["tp"])
        for name, tensor in local_tensors(values).items():
            owner, leaf = name.split(".")
            child = nn.Module()
            param = nn.Parameter(tensor)
            if name in layers:
                set_spec(param, layers[name][1])
            child.register_parameter(leaf, param)
            self.add_module(owner, child)
        self.register_buffer("count", torch.tensor(dist.get_rank() if dist.is_initialized() else 0))

    def train_steps(self, optimizer: ParallelOptimizer, steps: int) -> None:
        """Steps whose gradient of every element depends on the step and on its global place only."""
        for step in range(steps):
            gradients = local_tensors(reference(100 + step), padding=0.0)
            optimizer.zero_grad()
            pairs = [(p, gradients[n].to(p.dtype)) for n, p in self.named_parameters()]
            torch.stack([(p * g).sum() for p, g in pairs]).sum().backward()
            optimizer.step()


def make(zero1: bool, dtype: torch.dtype, seed: int, steps: int) -> tuple[Sharded, ParallelOptimizer]:
    model = Sharded(reference(seed, dtype))
    adam = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    optimizer = ParallelOptimizer(adam, zero1=zero1, master_weights=dtype == torch.bfloat16)
    model.train_steps(optimizer, steps)
    return model, optimizer


def save_in_small_pieces(path: str, tp: int, zero1: bool) -> int:
    """As :func:`save_as`, with boxes cut among the ranks that hold them as large ones are."""
    chunk, boxes.CHUNK_BYTES = boxes.CHUNK_BYTES, 16
    try:
        return save_as(path, tp, zero1, torch.float32)
    finally:
        boxes.CHUNK_BYTES = chunk


def save_as(path: str, tp: int, zero1: bool, dtype: torch.dtype, kind: str = "deduped") -> int:
    """Trains two steps under a layout and saves. Returns the bytes on disk of all shards."""
    with layout(tp):
        model, optimizer = make(zero1, dtype, seed=0, steps=2)
        checkpoint.write_checkpoint(
            path,
            module_state=model.state_dict(),
            parameters=dict(model.named_parameters()),
            optimizers=[optimizer],
            trainer_state={"global_step": 2},
            rank_state={"rank": dist.get_rank() if dist.is_initialized() else 0},
            state_dict_type=kind,
        )
        return sum(f.stat().st_size for f in Path(path).glob("rank-*.safetensors"))


def load_as(path: str, tp: int, zero1: bool, dtype: torch.dtype) -> list[str]:
    """Loads under a layout and compares with a run that always had it. Returns the names that differ."""
    with layout(tp):
        expected_model, expected = make(zero1, dtype, seed=0, steps=2)
        model, optimizer = make(zero1, dtype, seed=9, steps=0)
        named = dict(model.named_parameters())
        checkpoint.load_module_state(path, model.state_dict(), named)
        checkpoint.load_optimizer_state(path, [optimizer], named)
        return compare(model, optimizer, expected_model, expected)


def compare(
    model: Sharded, optimizer: ParallelOptimizer, expected_model: Sharded, expected: ParallelOptimizer
) -> list[str]:
    tp = mesh.current().sizes["tp"]
    different = []
    others = dict(expected_model.named_parameters())
    names = {id(p): n for n, p in model.named_parameters()}
    for name, param in model.named_parameters():
        for place in boxes.placements(name, param, tp):
            if not torch.equal(boxes.view(param, place.local), boxes.view(others[name], place.local)):
                different.append(place.name)
    for got, want in zip(optimizer.export_state(), expected.export_state(), strict=True):
        name = names[id(got.param)]
        if (got.start, got.stop, got.scalars) != (want.start, want.stop, want.scalars):
            different.append(f"{name}: {got.scalars} {want.scalars}")
        if set(got.tensors) != set(want.tensors):
            different.append(f"{name}: {set(got.tensors)} {set(want.tensors)}")
        for place in boxes.flat_placements(name, got.param, tp, got.start, got.stop):
            for key in want.tensors.keys() & got.tensors.keys():
                a, b = (
                    boxes.flat_view(s.tensors[key], s.start, tuple(s.param.shape), place.local)
                    for s in (got, want)
                )
                if not torch.equal(a, b):
                    different.append(f"{place.name}/{key}")
    if model.get_buffer("count").item() != 0:
        different.append("count")
    return different


def full_state(path: str) -> dict[str, Tensor]:
    return checkpoint.read_full_state(path)


def save_with_failure(path: str, failing: int) -> tuple[str, list[str]]:
    """A save in which one rank's disk is full; then one that works. Returns the error and what is left."""

    def full_disk() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with layout(2):
        try:
            model, _ = make(True, torch.float32, 0, 0)
            arguments: dict[str, Any] = {
                "module_state": model.state_dict(),
                "parameters": dict(model.named_parameters()),
                "trainer_state": {},
            }
            if dist.get_rank() == failing:
                points.on("share_opened", full_disk)
            try:
                checkpoint.write_checkpoint(path, **arguments)
                message = "no error"
            except CheckpointError as error:
                message = str(error)
            dist.barrier()
            left = sorted(f.name for f in Path(path).parent.iterdir())
            points.clear()
            dist.barrier()
            checkpoint.write_checkpoint(path, **arguments)
            return message, left
        finally:
            points.clear()


def load_after_damage(path: str) -> str:
    try:
        with layout():
            model, _ = make(False, torch.float32, 0, 0)
            checkpoint.load_module_state(path, model.state_dict(), dict(model.named_parameters()))
            return "no error"
    except CheckpointError as error:
        return str(error)


def save_to_different_paths(folder: str) -> str:
    try:
        with layout():
            model, _ = make(False, torch.float32, 0, 0)
            checkpoint.write_checkpoint(
                f"{folder}/{dist.get_rank()}",
                module_state=model.state_dict(),
                parameters=dict(model.named_parameters()),
                trainer_state={},
            )
            return "no error"
    except CheckpointError as error:
        return str(error)
