"""A small training problem for the optimizer tests, and the same problem in plain torch on one process.

Rank r of dp trains on its slice of each global batch; the reference averages over all slices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuron_lightning.optim import ParallelOptimizer
from tests.devices import layout

CLASSES: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.05, initial_accumulator_value=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
}


class Net(nn.Module):
    """An MLP with tied weights, a parameter never used, one used by one rank only, one every other step."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(
                (0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
            )

        self.first, self.bias, self.second = draw(8, 5), draw(8), draw(3, 8)
        self.never, self.one_rank, self.sometimes = draw(7), draw(3, 3), draw(3)
        self.scale, self.empty = draw(), draw(0, 4)
        self.tied = self.second

    def forward(self, x: Tensor, rank: int, step: int) -> Tensor:
        hidden = torch.tanh(x @ self.first.T + self.bias)
        out = hidden @ self.second.T * self.scale + 0.1 * (hidden**2) @ self.tied.T
        if rank == 1:
            out = out @ self.one_rank
        if step % 2:
            out = out + self.sometimes
        return out

    def loss(self, step: int, micro: int, rank: int, dp: int, micros: int) -> Tensor:
        """Loss of one micro-batch, divided by the number of micro-batches."""
        generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
        x = torch.randn(4, 5, generator=generator, dtype=torch.float64).to(self.first.dtype)
        y = torch.randn(4, 3, generator=generator, dtype=torch.float64).to(self.first.dtype)
        return ((self(x, rank, step) - y) ** 2).mean() / micros

    def groups(self) -> list[dict[str, Any]]:
        """Two parameter groups with settings of their own."""
        rest = [self.bias, self.never, self.sometimes, self.scale, self.empty]
        return [
            {"params": [self.first, self.second, self.one_rank], "weight_decay": 0.1},
            {"params": rest, "weight_decay": 0.0, "lr": 0.02},
        ]


def vector(net: Net) -> Tensor:
    """All parameters, one after another."""
    return torch.cat([p.detach().double().flatten() for p in net.parameters()])


def train_reference(
    name: str, dp: int, steps: int, micros: int, clip: float | None
) -> tuple[Tensor, list[float]]:
    """Parameters and grad norms of plain torch on the averaged gradients."""
    net = Net()
    optimizer = CLASSES[name](net.groups())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1.0 / (1 + 0.1 * s))
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(micros):
            for rank in range(dp):
                (net.loss(step, micro, rank, dp, micros) / dp).backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), clip if clip is not None else float("inf"))
        norms.append(norm.item())
        optimizer.step()
        scheduler.step()
    return vector(net), norms


def train_parallel(
    name: str, zero1: bool, steps: int, micros: int, clip: float | None, bucket_bytes: int
) -> tuple[Tensor, list[float]]:
    """The same on the ranks of the present process group; every rank calls it together."""
    with layout():
        rank, dp = dist.get_rank(), dist.get_world_size()
        net = Net()
        optimizer = ParallelOptimizer(
            CLASSES[name](net.groups()), zero1=zero1, max_grad_norm=clip, bucket_bytes=bucket_bytes
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda s: 1.0 / (1 + 0.1 * s))
        norms = []
        for step in range(steps):
            optimizer.zero_grad()
            for micro in range(micros):
                net.loss(step, micro, rank, dp, micros).backward()
            optimizer.step()
            scheduler.step()
            assert optimizer.grad_norm is not None
            norms.append(optimizer.grad_norm.item())
        assert net.tied is net.second
        return vector(net), norms
