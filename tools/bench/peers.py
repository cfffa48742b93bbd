"""The peers: each builds its model and optimizer from the same weights and returns a function that does a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from workload import Workload

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One row of the table.

    Attributes:
        label: its name in the table.
        world_size: processes.
        build: makes the step function on each rank.
        tensor_parallel: processes that share a replica.
        ours: whether it is this package's.
    """

    label: str
    world_size: int
    build: Callable[[Workload, Path, torch.dtype], Step]
    tensor_parallel: int = 1
    ours: bool = False


def hugging_face(folder: Path, dtype: torch.dtype) -> nn.Module:
    """transformers' own model with the common weights, in training mode."""
    from transformers import LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).train()
    return model


def our_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Ours with the common weights, on the current layout."""
    from neuron_lightning.models.llama_hf import from_hf

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return from_hf(folder).train()
    finally:
        torch.set_default_dtype(default)


def torch_step(model: nn.Module, workload: Workload, optimizer: torch.optim.Optimizer) -> Step:
    """Forward, backward, clip by norm, step: what a plain loop does."""

    def step(input_ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), workload.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def build_hugging_face(*, fused: bool) -> Callable[[Workload, Path, torch.dtype], Step]:
    """One process, AdamW ``fused`` or ``foreach``."""

    def build(workload: Workload, folder: Path, dtype: torch.dtype) -> Step:
        model = hugging_face(folder, dtype)
        kind: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
        return torch_step(model, workload, torch.optim.AdamW(model.parameters(), lr=workload.lr, **kind))

    return build


def build_ddp(workload: Workload, folder: Path, dtype: torch.dtype) -> Step:
    """DistributedDataParallel with fused AdamW."""
    model = nn.parallel.DistributedDataParallel(hugging_face(folder, dtype), gradient_as_bucket_view=True)
    return torch_step(
        model, workload, torch.optim.AdamW(model.module.parameters(), lr=workload.lr, fused=True)
    )


def build_dtensor(workload: Workload, folder: Path, dtype: torch.dtype) -> Step:
    """torch's own tensor parallelism over the same model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan: dict[str, Any] = {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
    plan |= {f"model.layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    model = parallelize_module(
        hugging_face(folder, dtype), init_device_mesh("cpu", (dist.get_world_size(),)), plan
    )
    # fused AdamW does not take DTensors and plain tensors together
    parameters = list(model.parameters())
    sharded = [p for p in parameters if isinstance(p.data, DTensor)]
    plain = [p for p in parameters if not isinstance(p.data, DTensor)]
    optimizer = torch.optim.AdamW([{"params": sharded}, {"params": plain}], lr=workload.lr, foreach=False)

    def step(input_ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        norms = [torch.nn.utils.get_total_norm([p.grad for p in part]) for part in (sharded, plain)]
        total = (norms[0].full_tensor() ** 2 + norms[1] ** 2).sqrt()
        for part in (sharded, plain):
            torch.nn.utils.clip_grads_with_norm_(part, workload.max_grad_norm, total, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def build_ours(
    *, tensor_parallel: int = 1, zero1: bool = False
) -> Callable[[Workload, Path, torch.dtype], Step]:
    """This package's model and optimizer in a plain loop, without fp32 copies: the peers keep none either."""

    def build(workload: Workload, folder: Path, dtype: torch.dtype) -> Step:
        from neuron_lightning.optim import ParallelOptimizer
        from neuron_lightning.parallel import parallel_state

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
        model = our_model(folder, dtype)
        optimizer = ParallelOptimizer(
            torch.optim.AdamW(model.parameters(), lr=workload.lr),
            zero1=zero1,
            max_grad_norm=workload.max_grad_norm,
        )

        def step(input_ids: Tensor) -> Tensor:
            loss: Tensor = model(input_ids=input_ids, labels=input_ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    return build


def under_the_trainer(workload: Workload, folder: Path, dtype: torch.dtype) -> Step:
    """Marks a row that the Trainer drives (see trainer.py); it has no step function."""
    raise TypeError("a Trainer row is run by trainer.py")


PEERS = {
    "hf-foreach": Peer(
        label="Hugging Face, foreach AdamW", world_size=1, build=build_hugging_face(fused=False)
    ),
    "hf-fused": Peer(label="Hugging Face, fused AdamW", world_size=1, build=build_hugging_face(fused=True)),
    "ours-1x1": Peer(label="ours 1x1", world_size=1, build=build_ours(), ours=True),
    "ddp": Peer(label="Hugging Face, torch DDP", world_size=2, build=build_ddp),
    "ours-1x2": Peer(label="ours 1x2", world_size=2, build=build_ours(), ours=True),
    "ours-1x2-zero1": Peer(label="ours 1x2, ZeRO-1", world_size=2, build=build_ours(zero1=True), ours=True),
    "dtensor": Peer(
        label="Hugging Face, torch DTensor TP", world_size=2, build=build_dtensor, tensor_parallel=2
    ),
    "ours-2x1": Peer(
        label="ours 2x1", world_size=2, build=build_ours(tensor_parallel=2), tensor_parallel=2, ours=True
    ),
    "lightning-ddp": Peer(label="Lightning DDP, Hugging Face", world_size=2, build=under_the_trainer),
    "ours-trainer": Peer(
        label="ours 1x2, ZeRO-1, under the Trainer", world_size=2, build=under_the_trainer, ours=True
    ),
}
"""Rows by name; the first of each table below is what the others are compared with."""

TABLES = {
    "one process": ["hf-foreach", "hf-fused", "ours-1x1"],
    "two processes": ["ddp", "ours-1x2", "ours-1x2-zero1", "dtensor", "ours-2x1"],
    "two processes, Lightning Trainer": ["lightning-ddp", "ours-trainer"],
}
