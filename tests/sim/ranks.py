"""What the ranks of the tests of the process group run: each collective against what it should give."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.devices import on_device

BATCH, STEPS = 4, 3


def rank_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rank + 1 in every element."""
    return torch.full(shape, dist.get_rank() + 1, dtype=dtype)


def check_reductions() -> None:
    with on_device():
        for dtype, mean in ((torch.float32, 1.5), (torch.bfloat16, 1.5), (torch.int64, 1)):
            for op, value in ((dist.ReduceOp.SUM, 3), (dist.ReduceOp.MAX, 2), (dist.ReduceOp.AVG, mean)):
                x = rank_tensor(3, dtype=dtype)
                dist.all_reduce(x, op)
                assert x.tolist() == [value] * 3, (dtype, op, x)
        x = rank_tensor(2)
        dist.reduce(x, 1)
        assert dist.get_rank() != 1 or x[0] == 3
        x, part = torch.arange(4.0), torch.empty(2)
        dist.reduce_scatter_tensor(part, x, op=dist.ReduceOp.AVG)
        assert part.tolist() == [[0, 1], [2, 3]][dist.get_rank()]
        dist.reduce_scatter(part, list(torch.arange(4.0).chunk(2)))
        assert part.tolist() == [[0, 2], [4, 6]][dist.get_rank()]


def check_asynchronous_mean() -> None:
    """A mean is divided once however often and by whichever way it is waited for."""
    with on_device() as device:
        x = rank_tensor(3)
        work = dist.all_reduce(x, dist.ReduceOp.AVG, async_op=True)
        work.wait()
        work.wait()
        (result,) = work.get_future().wait()
        assert x.tolist() == [1.5] * 3
        assert result.data_ptr() == x.data_ptr()
        assert result.device == device


def check_exchanges() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    with on_device():
        out = torch.empty(2 * size)
        dist.all_gather_into_tensor(out, rank_tensor(2))
        assert out.tolist() == [1, 1, 2, 2]
        parts = [torch.empty(2) for _ in range(size)]
        dist.all_gather(parts, rank_tensor(2))
        assert [p[0].item() for p in parts] == [1, 2]
        x = rank_tensor(2)
        dist.broadcast(x, 1)
        assert x[0] == 2
        one = torch.empty(1)
        dist.scatter(one, [torch.tensor([5.0]), torch.tensor([6.0])] if rank == 0 else None, src=0)
        assert one.item() == 5 + rank
        gathered = [torch.empty(1) for _ in range(size)] if rank == 0 else None
        dist.gather(one, gathered, dst=0)
        assert gathered is None or gathered[1].item() == 6
        x, out = torch.arange(2.0) + 10 * rank, torch.empty(2)
        dist.all_to_all_single(out, x)
        assert out.tolist() == [rank, 10 + rank]
        incoming, y = torch.empty(2), rank_tensor(2)
        requests = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, y, 1 - rank), dist.P2POp(dist.irecv, incoming, 1 - rank)]
        )
        for request in requests:
            request.wait()
        assert incoming[0] == 2 - rank
        objects: list[Any] = [None] * size
        dist.all_gather_object(objects, {"rank": rank})
        assert objects[1] == {"rank": 1}
        dist.barrier()


def check_functional_collectives() -> None:
    with on_device() as device:
        group = dist.group.WORLD
        x = rank_tensor(4).requires_grad_()
        assert functional.all_reduce(x.detach(), "avg", group).tolist() == [1.5] * 4
        assert functional.reduce_scatter_tensor(x.detach(), "sum", 0, group).tolist() == [3.0] * 2
        functional.all_gather_tensor_autograd(x, 0, group).sum().backward()
        assert x.grad.device == device
        assert x.grad.tolist() == [2.0] * 4
        compiled = torch.compile(
            lambda t: functional.all_reduce(t * 2, "sum", group) + 1, backend="neuron", fullgraph=True
        )
        assert compiled(x.detach()).tolist() == [7.0] * 4


def check_split_groups() -> list[tuple[int, ...]]:
    """Groups of a mesh are split from the world where the world is bound to a device."""
    from neuron_sim import records

    with on_device():
        mesh = init_device_mesh("neuron", (2, 2), mesh_dim_names=("dp", "tp"))
        dist.all_reduce(rank_tensor(1), group=mesh["tp"].get_group())
        x = rank_tensor(1)
        dist.all_reduce(x, group=mesh["dp"].get_group())
        assert x.item() == {0: 4, 1: 6}[dist.get_rank() % 2]
    return [one.ranks for one in records.counts().collectives if one.kind == "all_reduce"]


def start_bound_to_the_device() -> list[tuple[int, ...]]:
    """:func:`check_split_groups` in a world that is made with ``device_id``."""
    import os

    rank = int(os.environ["RANK"])
    torch.accelerator.set_device_index(rank)
    dist.init_process_group(
        "cpu:gloo,neuron:neuron", rank=rank, world_size=4, device_id=torch.device("neuron", rank)
    )
    try:
        half = dist.split_group(split_ranks=[[0, 1], [2, 3]])
        x = rank_tensor(1).to("neuron")
        dist.all_reduce(x, group=half)
        assert x.item() == (3 if rank < 2 else 7)
        return check_split_groups()
    finally:
        dist.destroy_process_group()


def call_in_another_order() -> None:
    """Rank 0 sums then gathers, rank 1 gathers as often but sums more elements."""
    with on_device():
        one = dist.get_rank()
        dist.all_gather([torch.empty(2), torch.empty(2)], torch.zeros(2))
        for count in (3, 4) if one == 0 else (4, 3):
            dist.all_reduce(torch.zeros(count), group=dist.group.WORLD, async_op=True)


def reference() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def _train(module: nn.Module, rows: slice) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for step in range(STEPS):
        x = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(step), device="cpu")[rows]
        module(x.to(next(module.parameters()).device)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def check_pytorchs_own_parallelism(kind: str) -> None:
    """DDP, fully_shard and tensor-parallel DTensors train on the device as one process does on the CPU."""
    expected, module = reference(), reference()
    _train(expected, slice(None))
    rank = dist.get_rank()
    rows = slice(2 * rank, 2 * rank + 2)
    with on_device() as device:
        module.to(device)
        mesh = init_device_mesh("neuron", (2,))
        if kind == "ddp":
            _train(nn.parallel.DistributedDataParallel(module, device_ids=[rank]), rows)
        elif kind == "fsdp":
            _train(fully_shard(module, mesh=mesh), rows)
        else:
            parallelize_module(module, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
            _train(module, slice(None))
        for mine, theirs in zip(module.parameters(), expected.parameters(), strict=True):
            assert mine.device.type == "neuron"
            full = mine.full_tensor() if isinstance(mine, DTensor) else mine
            torch.testing.assert_close(full.cpu(), theirs, rtol=1e-4, atol=1e-5)


def check_dtensor() -> None:
    with on_device():
        mesh = init_device_mesh("neuron", (2,))
        x = torch.arange(8.0).reshape(4, 2)
        cut = distribute_tensor(x, mesh, [Shard(0)])
        assert cut.redistribute(mesh, [Replicate()]).to_local().tolist() == x.tolist()
        assert cut.redistribute(mesh, [Shard(1)]).to_local().shape == (4, 1)
        total = DTensor.from_local(torch.ones(4), mesh, [Partial()])
        assert total.full_tensor().tolist() == [2.0] * 4


def check_distributed_checkpoint(folder: str, background: bool) -> None:
    with on_device() as device:
        state = {"x": rank_tensor(3), "y": torch.arange(5.0)}
        if background:
            dcp.async_save(state, checkpoint_id=folder).result()
        else:
            dcp.save(state, checkpoint_id=folder)
        read = {"y": torch.zeros(5)}
        dcp.load(read, checkpoint_id=folder)
        assert read["y"].device == device
        assert read["y"].tolist() == state["y"].tolist()
