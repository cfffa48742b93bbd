"""One process of one measurement: builds a peer, trains some steps, writes what rank 0 saw. Started by step.py."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import peers
import torch
import torch.distributed as dist
from torch import Tensor
from workload import SEED, WORKLOADS, Workload, matmul_flops

from neuron_lightning.backends import get_backend


def main() -> None:
    """Does what the arguments say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", help="a peer's name, 'matmul' or 'prepare'")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    workload, dtype = WORKLOADS[options.workload], getattr(torch, options.dtype)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if options.job == "prepare":
        prepare(workload, options.weights)
        return
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    result = matmul(workload, dtype) if options.job == "matmul" else train(options, workload, dtype)
    if int(os.environ["RANK"]) == 0:
        options.output.write_text(json.dumps(result), encoding="utf-8")
    if dist.is_initialized():
        dist.barrier()
        get_backend().destroy_process_group()


def prepare(workload: Workload, folder: Path) -> None:
    """Writes the weights that every peer starts from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    LlamaForCausalLM(LlamaConfig(**workload.hf_config())).save_pretrained(folder)


def matmul(workload: Workload, dtype: torch.dtype) -> dict[str, Any]:
    """FLOP/s of matrix products on all ranks at once."""
    if dist.is_initialized():
        dist.barrier()
    flops = torch.tensor(matmul_flops(workload, dtype, seconds=2.0), dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(flops)
    return {"flops": flops.item()}


def train(options: argparse.Namespace, workload: Workload, dtype: torch.dtype) -> dict[str, Any]:
    """Median seconds of a step after the warm-up, and the losses averaged over replicas."""
    peer = peers.PEERS[options.job]
    num_steps = options.warmup + options.steps
    if peer.build is peers.under_the_trainer:
        import trainer

        seconds, losses = trainer.run(options.job, workload, options.weights, dtype, num_steps)
    else:
        seconds, losses = _loop(peer, workload, options.weights, dtype, num_steps)
    mean = torch.stack([loss.float() for loss in losses])
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return {
        "seconds": statistics.median(seconds[options.warmup :]),
        "losses": mean.tolist(),
        "threads": torch.get_num_threads(),
    }


def _loop(
    peer: peers.Peer, workload: Workload, weights: Path, dtype: torch.dtype, num_steps: int
) -> tuple[list[float], list[Tensor]]:
    step = peer.build(workload, weights, dtype)
    rank = int(os.environ["RANK"])
    replica, replicas = rank // peer.tensor_parallel, peer.world_size // peer.tensor_parallel
    seconds, losses = [], []
    for index in range(num_steps):
        batch = workload.batch(index, replica, replicas, peer.world_size)
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        losses.append(step(batch))
        if dist.is_initialized():
            dist.barrier()
        seconds.append(time.perf_counter() - start)
    return seconds, losses


if __name__ == "__main__":
    main()
