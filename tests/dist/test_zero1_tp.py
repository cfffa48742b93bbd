"""Tensor-parallel shards described by hand: partial gradients, replicas, the norm, and agreement between ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuron_lightning.errors import OptimizerError
from neuron_lightning.optim import ParallelOptimizer, ParamState
from neuron_lightning.parallel import parallel_state
from neuron_lightning.parallel.spec import ShardPart, ShardSpec, set_spec
from neuron_lightning.testing import RankPool
from tests.devices import layout

TP = 2
STEPS = 5
CLIP = 0.3


def _global(name: str) -> Tensor:
    """The unsharded weights: q (6, 3) and kv (2, 3) in one fused parameter, a norm weight, a bias."""
    shapes = {"q": (6, 3), "kv": (2, 3), "norm": (70,), "bias": (4,)}
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shapes[name], generator=generator, dtype=torch.float64)


def _gradient(name: str, step: int, dp: int, share: int | None = None) -> Tensor:
    """Gradient of a global tensor on data-parallel rank ``dp``; or the share of a partial sum on one TP rank."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 100 * step + 10 * dp)
    shares = torch.randn(TP, *_global(name).shape, generator=generator, dtype=torch.float64)
    return shares.sum(0) if share is None else shares[share]


def _parameters(tp_rank: int) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    fused = nn.Parameter(torch.cat([_global("q").chunk(TP)[tp_rank], _global("kv")]))
    q = ShardPart(
        name="q",
        global_shape=(6, 3),
        global_offset=(3 * tp_rank, 0),
        shape=(3, 3),
        local_offset=(0, 0),
        local_rows=3,
    )
    kv = ShardPart(
        name="kv",
        global_shape=(2, 3),
        global_offset=(0, 0),
        shape=(2, 3),
        local_offset=(3, 0),
        local_rows=2,
        replicas=TP,
        grad_ranks=TP,
    )
    set_spec(fused, ShardSpec(parts=(q, kv)))
    norm = nn.Parameter(_global("norm"))
    norm.sequence_parallel_enabled = True  # type: ignore[attr-defined]
    return fused, norm, nn.Parameter(_global("bias"))


def _train(zero1: bool) -> tuple[dict[str, Tensor], list[float], int]:
    """Feeds each rank its own gradients; returns the weights by global name and the norms."""
    with layout(tensor_model_parallel_size=TP):
        tp = parallel_state.get_tensor_model_parallel_rank()
        dp = parallel_state.get_data_parallel_rank()
        fused, norm, bias = _parameters(tp)
        users = torch.optim.AdamW(
            [{"params": [fused]}, {"params": [norm, bias], "weight_decay": 0.0}], lr=0.05
        )
        optimizer = ParallelOptimizer(users, zero1=zero1, max_grad_norm=CLIP, bucket_bytes=400)
        norms = []
        for step in range(STEPS):
            optimizer.zero_grad()
            q = _gradient("q", step, dp).chunk(TP)[tp]
            (fused * torch.cat([q, _gradient("kv", step, dp, tp)])).sum().backward()
            (norm * _gradient("norm", step, dp, tp)).sum().backward()
            (bias * _gradient("bias", step, dp)).sum().backward()
            optimizer.step()
            assert optimizer.grad_norm is not None
            norms.append(optimizer.grad_norm.item())
        weights = {
            "q": fused.detach()[:3],
            "kv": fused.detach()[3:],
            "norm": norm.detach(),
            "bias": bias.detach(),
        }
        return {k: v.clone() for k, v in weights.items()}, norms, tp


def _reference(dp_size: int) -> tuple[dict[str, Tensor], list[float]]:
    weights = {name: nn.Parameter(_global(name)) for name in ("q", "kv", "norm", "bias")}
    groups = [
        {"params": [weights["q"], weights["kv"]]},
        {"params": [weights["norm"], weights["bias"]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    norms = []
    for step in range(STEPS):
        for name, param in weights.items():
            param.grad = sum(_gradient(name, step, d) for d in range(dp_size)) / dp_size  # type: ignore[assignment]
        norms.append(nn.utils.clip_grad_norm_(list(weights.values()), CLIP).item())
        optimizer.step()
    return {name: param.detach() for name, param in weights.items()}, norms


@pytest.mark.parametrize("zero1", [False, True], ids=["plain", "zero1"])
@pytest.mark.parametrize("world", [2, 4])
def test_shards_train_as_the_whole(request: pytest.FixtureRequest, world: int, zero1: bool) -> None:
    """Replicated KV rows, sequence-parallel norms and plain replicas: each counted once, at dp 1 and 2."""
    pool: RankPool = request.getfixturevalue(f"pool{world}")
    expected, norms = _reference(world // TP)
    for weights, seen, tp in pool.run(_train, zero1):
        assert seen == pytest.approx(norms, rel=1e-12)
        for name, weight in weights.items():
            whole = expected[name].chunk(TP)[tp] if name == "q" else expected[name]
            assert (weight - whole).abs().max() <= 1e-13, name


def _refused() -> str:
    try:
        with layout(tensor_model_parallel_size=TP):
            ParallelOptimizer(torch.optim.Adafactor(_parameters(0)[:1]), zero1=False)
    except OptimizerError as error:
        return str(error)
    return "accepted"


def test_an_optimizer_that_is_not_elementwise_is_refused_under_tensor_parallelism(pool2: RankPool) -> None:
    for message in pool2.run(_refused):
        assert "shard by shard" in message
        assert "tensor_parallel_size=1" in message


def _features(zero1: bool) -> dict[str, Any]:
    """Gradients, clipping by value, non-finite values and empty steps at dp 2."""
    with layout():
        rank = dist.get_rank()
        params = [nn.Parameter(torch.full((100,), float(i))) for i in range(4)]
        optimizer = ParallelOptimizer(torch.optim.SGD(params, lr=1.0), zero1=zero1, bucket_bytes=600)
        result: dict[str, Any] = {}
        optimizer.step()
        result["unmoved"] = [p[0].item() for p in params]
        (params[0].sum() * (1 + rank)).backward()
        if rank == 1:
            (params[1] * torch.arange(100.0)).sum().backward()
        optimizer.clip_grad_value(5.0)
        result["full_grads"] = [None if (g := optimizer.full_grad(p)) is None else g[:20] for p in params]
        result["norm"] = optimizer.grad_norm.item() if optimizer.grad_norm is not None else None
        optimizer.step()
        result["moved"] = [p[:20].detach().clone() for p in params]
        optimizer.zero_grad()
        (params[3].sum() * (float("nan") if rank == 1 else 1.0)).backward()
        result["found_inf"] = optimizer.unscale(torch.tensor(0.5)).item()
        return result


@pytest.mark.parametrize("zero1", [False, True], ids=["plain", "zero1"])
def test_ranks_agree_on_everything(pool2: RankPool, zero1: bool) -> None:
    second = (torch.arange(100.0) / 2).clamp(max=5.0)
    for result in pool2.run(_features, zero1):
        assert result["unmoved"] == [0.0, 1.0, 2.0, 3.0]
        first, other, third, fourth = result["full_grads"]
        assert torch.equal(first, torch.full((20,), 1.5))
        assert torch.equal(other, second[:20])
        assert third is None
        assert fourth is None
        exact = (100 * 1.5**2 + float((torch.arange(100.0) / 2).square().sum())) ** 0.5
        assert result["norm"] == pytest.approx(exact, rel=1e-6)
        assert torch.equal(result["moved"][0], torch.full((20,), -1.5))
        assert torch.equal(result["moved"][1], 1.0 - second[:20])
        assert torch.equal(result["moved"][2], torch.full((20,), 2.0))
        assert result["found_inf"] == 1.0


def _train_from(
    saved: list[tuple[list[Tensor], list[tuple[int, int, int, Any, Any]]]] | None, zero1: bool
) -> Any:
    """Three steps and an export; or an import of every rank's export, cut to this layout, and three more."""
    with layout():
        generator = torch.Generator().manual_seed(5)
        params = [nn.Parameter(torch.randn(n, generator=generator).bfloat16()) for n in (100, 7, 333)]
        if saved is not None:
            for param, weight in zip(params, saved[0][0], strict=True):
                param.data.copy_(weight)
        optimizer = ParallelOptimizer(torch.optim.AdamW(params, lr=0.01), zero1=zero1, master_weights=True)
        if saved is not None:
            optimizer.import_state([_cut(state, params, saved) for state in optimizer.export_state()])
        start = 0 if saved is None else 3
        for step in range(start, start + 3):
            optimizer.zero_grad()
            for param in params:  # the same global gradient whatever dp is
                (param * torch.cos(param.detach() + step)).sum().backward()
            optimizer.step()
        index = {id(p): i for i, p in enumerate(params)}
        states = [
            (index[id(s.param)], s.start, s.stop, s.tensors, s.scalars) for s in optimizer.export_state()
        ]
        return [p.detach() for p in params], states


def _cut(state: ParamState, params: list[nn.Parameter], saved: Any) -> ParamState:
    """Assembles a parameter's state from all ranks' pieces and cuts it to what ``state`` asks for."""
    index = next(i for i, p in enumerate(params) if p is state.param)
    whole = {name: torch.zeros(state.param.numel()) for name in ("master", "exp_avg", "exp_avg_sq")}
    for _, pieces in saved:
        for i, start, stop, tensors, scalars in pieces:
            if i == index:
                state.scalars = scalars
                for name, value in tensors.items():
                    whole[name][start:stop] = value
    state.tensors = {name: value[state.start : state.stop] for name, value in whole.items()}
    return state


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_state_moves_to_another_number_of_ranks_and_between_zero1_and_plain(
    pool2: RankPool, pool4: RankPool, before: bool, after: bool
) -> None:
    saved = pool2.run(_train_from, None, before)
    straight = pool2.run(_train_from, saved, before)[0][0]
    moved = pool4.run(_train_from, saved, after)
    for weights, _ in moved:
        assert all(torch.equal(a, b) for a, b in zip(weights, straight, strict=True))


def _fails_alike() -> str:
    try:
        with layout():
            ParallelOptimizer(torch.optim.LBFGS([nn.Parameter(torch.zeros(3))]), zero1=True)
    except OptimizerError as error:
        return str(error)
    return "accepted"


def test_every_rank_raises_the_same_error(pool2: RankPool) -> None:
    first, second = pool2.run(_fails_alike)
    assert first == second
    assert first.startswith("LBFGS cannot be used here")
