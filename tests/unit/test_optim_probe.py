"""Which optimizer classes ZeRO-1 accepts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

from neuron_lightning.errors import OptimizerError
from neuron_lightning.optim import ParallelOptimizer
from neuron_lightning.optim.inner import can_fuse
from neuron_lightning.optim.probe import examine

Make = Callable[[list[nn.Parameter]], optim.Optimizer]

ELEMENTWISE: dict[str, Make] = {
    "Adam": optim.Adam,
    "Adam-fused": lambda p: optim.Adam(p, fused=True),
    "AdamW-amsgrad": lambda p: optim.AdamW(p, amsgrad=True),
    "AdamW-at-lr-0": lambda p: optim.AdamW(p, lr=0.0),
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD-momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "SGD-nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: optim.Adagrad(p, initial_accumulator_value=0.1),
    "RMSprop": lambda p: optim.RMSprop(p, momentum=0.9, centered=True),
    "Adamax": optim.Adamax,
    "NAdam": optim.NAdam,
    "RAdam": optim.RAdam,
    "Adadelta": optim.Adadelta,
    "Rprop": optim.Rprop,
    "ASGD": optim.ASGD,
}
NOT_ELEMENTWISE: dict[str, Make] = {
    "LBFGS": optim.LBFGS,
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.0),
    "Muon": optim.Muon,
    "SparseAdam": optim.SparseAdam,
}


class CountingSGD(optim.SGD):
    """Keeps a step counter in its groups, as several published optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] = 0.1 / group["count"]
        return super().step(closure)


class NormalisedSGD(optim.SGD):
    """Divides each gradient by its norm over the whole parameter."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad = param.grad / param.grad.norm()
        return super().step(closure)


def _params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64)) for _ in range(3)]


def _train(optimizer: optim.Optimizer, params: list[nn.Parameter]) -> torch.Tensor:
    for step in range(4):
        optimizer.zero_grad()
        sum((p * torch.sin(p + step)).sum() for p in params[: 2 + step % 2]).backward()  # type: ignore[union-attr]
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])


@pytest.mark.parametrize(
    "make", [*ELEMENTWISE.values(), lambda p: CountingSGD(p, lr=0.1)], ids=[*ELEMENTWISE, "Counting"]
)
def test_elementwise_classes_train_under_zero1_as_without(make: Make) -> None:
    params, reference = _params(), _params()
    expected = _train(make(reference), reference)
    optimizer = ParallelOptimizer(make(params), zero1=True, bucket_bytes=200)
    assert (_train(optimizer, params) - expected).abs().max() <= 1e-13


@pytest.mark.parametrize("name", NOT_ELEMENTWISE)
def test_other_classes_are_refused_with_class_rule_and_remedy(name: str) -> None:
    with pytest.raises(OptimizerError, match=rf"(?s){name} cannot.*flat pieces.*zero1=False.*AdamW"):
        ParallelOptimizer(NOT_ELEMENTWISE[name](_params()), zero1=True)


def test_a_users_own_class_is_judged_by_what_it_does() -> None:
    with pytest.raises(OptimizerError, match=r"NormalisedSGD.*two pieces is off by"):
        ParallelOptimizer(NormalisedSGD(_params(), lr=0.1), zero1=True)
    traits = examine(CountingSGD(_params(), lr=0.1))
    assert traits.elementwise
    assert not traits.bucketwise


@pytest.mark.parametrize("make", [optim.Adafactor, optim.Muon, lambda p: NormalisedSGD(p, lr=0.1)])
def test_the_refused_classes_work_without_zero1(make: Make) -> None:
    params, reference = _params(), _params()
    expected = _train(make(reference), reference)
    assert (_train(ParallelOptimizer(make(params), zero1=False), params) - expected).abs().max() <= 1e-13


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("narrow", [False, True])
def test_lbfgs_evaluates_its_closure_itself(line_search: str | None, narrow: bool) -> None:
    def train(parallel: bool) -> torch.Tensor:
        dtype = torch.bfloat16 if narrow else torch.float64
        param = nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3).to(dtype))
        optimizer: optim.Optimizer = optim.LBFGS([param], lr=0.5, max_iter=5, line_search_fn=line_search)
        if parallel:
            optimizer = ParallelOptimizer(optimizer, zero1=False, master_weights=True)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = ((param - 0.3) ** 4).sum() + (param**2).sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return param.detach().double()

    assert (train(True) - train(False)).abs().max() <= (0.05 if narrow else 1e-12)


def test_the_probe_leaves_random_state_and_the_users_optimizer_alone() -> None:
    optimizer = optim.Adam(_params(), lr=0.123)
    before = torch.get_rng_state()
    examine(optimizer)
    assert torch.equal(before, torch.get_rng_state())
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.123


def test_fused_only_where_the_user_left_it_open_and_it_works() -> None:
    kinds = {(torch.device("cpu"), torch.float32)}
    assert can_fuse(optim.AdamW(_params()), kinds)
    assert not can_fuse(optim.AdamW(_params(), foreach=False), kinds)
    assert not can_fuse(optim.AdamW(_params(), fused=False), kinds)
    assert not can_fuse(optim.NAdam(_params()), kinds)
    assert not can_fuse(optim.SGD(_params(), lr=0.1, momentum=0.9), kinds)  # torch's fails on late parameters
