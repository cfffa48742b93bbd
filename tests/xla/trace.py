"""Graphs that are recorded and looked at, but never run: what several Neuron cores would be given."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from neuron_lightning.backends import get_backend
from neuron_lightning.models.llama import LlamaForCausalLM
from neuron_lightning.optim import ParallelOptimizer
from neuron_lightning.parallel import mesh
from neuron_lightning.parallel.initialize import deferred_init, materialize
from tests.devices import layout
from tests.xla.llama import CONFIG, LENGTH, VOCAB


@contextlib.contextmanager
def recorded_only() -> Iterator[None]:
    """XLA's own collectives over the current mesh; nothing is started, because here there are no replicas."""
    from neuron_lightning.backends.xla.replicas import Replicas

    backend = get_backend()
    replicas = Replicas()
    for axis in mesh.AXES:
        replicas.adopt(mesh.current().group(axis), mesh.current().replica_groups(axis))
    with (
        mock.patch.object(backend, "_collectives", replicas),
        mock.patch.object(backend, "mark_step", return_value=None),
        mock.patch.dict(os.environ, {"XLA_ALWAYS_ALLREDUCE": "1"}),
    ):
        yield


def collectives(hlo: str) -> list[tuple[str, str]]:
    """Kind and groups of each collective, in order."""
    return re.findall(r" (all-reduce|all-gather|reduce-scatter)\(.*replica_groups=(\{\{[\d,{}]*?\}\})", hlo)


def each_collective(tp: int) -> dict[str, str]:
    """The graph of one collective of each kind along each axis."""
    from neuron_lightning.backends.xla import graphs

    found = {}
    backend = get_backend()
    with layout(tp):
        x = torch.rand(8, 4)
        backend.synchronize()
    with layout(tp), recorded_only():
        for axis in ("tp", "dp"):
            group = mesh.current().group(axis)
            size = mesh.current().sizes[axis]
            summed = x.clone()
            backend.all_reduce(summed, group)
            found[f"{axis} all-reduce"] = graphs.graph_text([summed])
            joined = torch.empty(8 * size, 4)
            backend.all_gather(joined, x, group)
            found[f"{axis} all-gather"] = graphs.graph_text([joined])
            mine = torch.empty(8 // size, 4)
            backend.reduce_scatter(mine, x.clone(), group)
            found[f"{axis} reduce-scatter"] = graphs.graph_text([mine])
    return found


def training_step(tp: int, zero1: bool, sequence_parallel: bool) -> tuple[str, str]:
    """The graphs of forward and backward, and of the optimizer's step, of the Llama."""
    from neuron_lightning.backends.xla import graphs

    with layout(tp, sequence_parallel=sequence_parallel):
        with deferred_init():
            model = LlamaForCausalLM(CONFIG)
        materialize(model, 3, get_backend().current_device())
        params = list(model.parameters())
        groups = [
            {"params": [p for p in params if p.dim() > 1]},
            {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = ParallelOptimizer(torch.optim.AdamW(groups, lr=1e-3), zero1=zero1, max_grad_norm=1.0)
        ids = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
        get_backend().rank_as_data(mesh.current().coordinates["tp"])
        get_backend().synchronize()
        with recorded_only():
            loss = model(ids, labels=ids).loss
            loss.backward()
            grads: list[Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
            forward = graphs.graph_text([loss.detach(), *grads])
            optimizer.step()
            step = graphs.graph_text([p.detach() for p in model.parameters()])
        return forward, step


def any_collectives(hlo: str) -> list[str]:
    """The kinds of all collectives of an optimised graph, in order."""
    return re.findall(
        r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", hlo
    )
