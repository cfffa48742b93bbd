"""What users, schedulers and Lightning may do with a wrapped optimizer, in one process."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from typing import Any

import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.utils._python_dispatch import TorchDispatchMode

from neuron_lightning.errors import OptimizerError
from neuron_lightning.optim import ParallelOptimizer, ParamState

ZERO1 = pytest.mark.parametrize("zero1", [False, True], ids=["plain", "zero1"])


def _param(*shape: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    numel = torch.Size(shape).numel()
    return nn.Parameter(torch.linspace(-1, 1, numel, dtype=torch.float64).reshape(shape).to(dtype))


def _backward(*params: nn.Parameter, factor: float = 1.0) -> None:
    sum(factor * (p * torch.cos(p.detach())).sum() for p in params).backward()  # type: ignore[union-attr]


class _Strategy:
    """What LightningOptimizer.step calls."""

    def optimizer_step(self, optimizer: torch.optim.Optimizer, closure: Any, **kwargs: Any) -> Any:
        return optimizer.step(closure, **kwargs)


@ZERO1
def test_works_through_lightnings_wrapper(zero1: bool) -> None:
    param, twin = _param(4, 3), _param(4, 3)
    optimizer = ParallelOptimizer(torch.optim.AdamW([param], lr=0.1), zero1=zero1, max_grad_norm=0.1)
    strategy = _Strategy()
    seen = LightningOptimizer._to_lightning_optimizer(optimizer, strategy)  # type: ignore[arg-type]
    reference = torch.optim.AdamW([twin], lr=0.1)
    assert isinstance(seen, ParallelOptimizer)
    assert isinstance(seen, torch.optim.Optimizer)
    for _ in range(3):
        seen.zero_grad()
        _backward(param)
        seen.synchronize()
        assert seen.full_grad(param).shape == (4, 3)
        seen.step()
        reference.zero_grad()
        _backward(twin)
        norm = nn.utils.clip_grad_norm_([twin], 0.1)
        reference.step()
        assert seen.grad_norm.item() == pytest.approx(norm.item(), rel=1e-12)
    assert seen.param_groups is optimizer.param_groups
    assert seen.state is optimizer.state
    assert (param - twin).abs().max() <= 1e-14
    seen.load_state_dict(seen.state_dict())


@ZERO1
@pytest.mark.parametrize("on_wrapper", [False, True])
def test_schedulers_drive_it_whichever_instance_they_were_made_for(zero1: bool, on_wrapper: bool) -> None:
    param, twin = _param(4, 3), _param(4, 3)
    users, reference = torch.optim.SGD([param], lr=1.0), torch.optim.SGD([twin], lr=1.0)
    early = None if on_wrapper else LambdaLR(users, lambda s: 0.5**s)
    optimizer = ParallelOptimizer(users, zero1=zero1)
    scheduler = LambdaLR(optimizer, lambda s: 0.5**s) if early is None else early
    theirs = LambdaLR(reference, lambda s: 0.5**s)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            for optim, leaf, schedule in ((optimizer, param, scheduler), (reference, twin, theirs)):
                optim.zero_grad()
                _backward(leaf)
                optim.step()
                schedule.step()
    assert optimizer.param_groups is users.param_groups
    assert users.param_groups[0]["lr"] == 0.5**4
    assert (param - twin).abs().max() <= 1e-14
    ReduceLROnPlateau(optimizer).step(1.0)
    OneCycleLR(optimizer, max_lr=1.0, total_steps=5)  # writes momentum, too


@ZERO1
def test_closure_hooks_and_return_value(zero1: bool) -> None:
    param = _param(3)
    users = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    optimizer = ParallelOptimizer(users, zero1=zero1)
    calls: list[object] = []
    users.register_step_pre_hook(lambda o, *_: calls.append(("pre", o)))
    optimizer.register_step_post_hook(lambda o, *_: calls.append(("post", o)))

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    before = float((param.detach() ** 2).sum())
    assert optimizer.step(closure).item() == pytest.approx(before)
    assert calls == [("pre", optimizer), ("post", optimizer)]


@ZERO1
def test_explicit_clipping_takes_the_place_of_the_configured_one(zero1: bool) -> None:
    param = _param(8)
    optimizer = ParallelOptimizer(torch.optim.SGD([param], lr=1.0), zero1=zero1, max_grad_norm=0.01)

    def step(clip: Any) -> tuple[Tensor, Tensor, float]:
        optimizer.zero_grad()
        _backward(param)
        grad = torch.cos(param.detach())
        before = param.detach().clone()
        clip()
        optimizer.step()
        assert optimizer.grad_norm is not None
        assert optimizer.grad_norm.item() == pytest.approx(grad.norm().item())
        return before - param.detach(), grad, grad.norm().item()

    moved, grad, norm = step(lambda: None)
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)
    moved, grad, norm = step(lambda: optimizer.clip_grad_norm(0.5))
    assert torch.allclose(moved, grad * 0.5 / (norm + 1e-6), rtol=1e-12)
    moved, grad, norm = step(lambda: optimizer.clip_grad_norm(1e9))
    assert torch.allclose(moved, grad, rtol=1e-12)
    moved, grad, norm = step(lambda: optimizer.clip_grad_value(0.7))
    assert torch.allclose(moved, grad.clamp(-0.7, 0.7), rtol=1e-12)
    moved, grad, norm = step(lambda: None)
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


@ZERO1
def test_gradients_where_users_look_for_them(zero1: bool) -> None:
    used, unused = _param(4), _param(4)
    optimizer = ParallelOptimizer(torch.optim.SGD([used, unused], lr=0.1), zero1=zero1)
    _backward(used)
    _backward(used)
    expected = 2 * torch.cos(used.detach())
    assert torch.allclose(used.grad, expected)
    optimizer.synchronize()
    optimizer.synchronize()
    assert (used.grad is None) == zero1
    assert zero1 or torch.allclose(used.grad, expected)
    assert torch.allclose(optimizer.full_grad(used), expected)
    assert optimizer.full_grad(unused) is None
    optimizer.step()
    assert used.grad is None
    assert torch.allclose(optimizer.full_grad(used), expected)
    with pytest.raises(OptimizerError, match="takes a trainable parameter of this optimizer"):
        optimizer.full_grad(_param(4))


@ZERO1
def test_a_step_without_gradients_changes_nothing_and_a_step_consumes_its_gradients(zero1: bool) -> None:
    param = _param(4)
    optimizer = ParallelOptimizer(
        torch.optim.AdamW([param], lr=0.1, weight_decay=0.1), zero1=zero1, max_grad_norm=1.0
    )
    before = param.detach().clone()
    optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.grad_norm.item() == 0.0
    _backward(param)
    optimizer.step()
    moved = param.detach().clone()
    assert not torch.equal(moved, before)
    optimizer.step()
    assert torch.equal(param, moved)


@ZERO1
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(zero1: bool, set_to_none: bool) -> None:
    direct, cast = _param(4), _param(4, dtype=torch.bfloat16)
    optimizer = ParallelOptimizer(
        torch.optim.SGD([direct, cast], lr=1.0, weight_decay=0.5), zero1=zero1, fp32_grad_accumulation=True
    )
    before = [p.detach().clone() for p in (direct, cast)]
    _backward(direct, cast)
    optimizer.zero_grad(set_to_none=set_to_none)
    optimizer.step()
    for param, old in zip((direct, cast), before, strict=True):  # a zero gradient still decays, as in torch
        assert torch.equal(param, old if set_to_none else 0.5 * old)


def test_the_modules_zero_grad_and_gradients_set_by_hand_count() -> None:
    module = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    weight = module.weight.detach().clone()
    optimizer = ParallelOptimizer(torch.optim.SGD(module.parameters(), lr=1.0), zero1=True)
    module(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    module.zero_grad()
    module(2 * torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert torch.allclose(module.weight, weight - 2)
    module.weight.grad = torch.full_like(module.weight, 3.0)
    optimizer.step()
    assert torch.allclose(module.weight, weight - 5)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_create_graph_and_gradient_checkpointing_accumulate_once() -> None:
    param = _param(4)
    optimizer = ParallelOptimizer(torch.optim.SGD([param], lr=1.0), zero1=True)
    for _ in range(2):
        (param**2).sum().backward(create_graph=True)
    expected = 4 * param.detach()
    assert torch.allclose(optimizer.full_grad(param), expected)
    optimizer.zero_grad()
    torch.utils.checkpoint.checkpoint(lambda x: (x**2).sum(), param, use_reentrant=True).backward()
    assert torch.allclose(optimizer.full_grad(param), 2 * param.detach())


@ZERO1
def test_backward_after_the_reduction_is_an_error_but_not_after_the_step(zero1: bool) -> None:
    generator, critic = _param(4), _param(4)
    optimizer = ParallelOptimizer(torch.optim.SGD([critic], lr=1.0), zero1=zero1)
    _backward(critic)
    optimizer.synchronize()
    with pytest.raises(OptimizerError, match=r"backward\(\) ran after synchronize\(\)"):
        _backward(critic)
    optimizer.zero_grad()
    _backward(critic)
    optimizer.step()
    after = critic.detach().clone()
    (generator * critic).sum().backward()  # the generator's loss reaches the critic, as GANs do
    optimizer.zero_grad()
    _backward(critic)
    optimizer.step()
    assert torch.allclose(critic, after - torch.cos(after))


def test_unscale_finds_what_is_not_finite() -> None:
    param = _param(4)
    optimizer = ParallelOptimizer(torch.optim.SGD([param], lr=1.0), zero1=True)
    _backward(param, factor=1024.0)
    assert optimizer.unscale(torch.tensor(1 / 1024)).item() == 0.0
    assert torch.allclose(optimizer.full_grad(param), torch.cos(param.detach()))
    assert optimizer.clip_grad_norm(1e9).item() == pytest.approx(torch.cos(param.detach()).norm().item())
    optimizer.zero_grad()
    _backward(param, factor=float("inf"))
    assert optimizer.unscale(torch.tensor(1 / 1024)).item() == 1.0


@pytest.mark.parametrize("accumulate", [False, True], ids=["bf16", "fp32"])
@ZERO1
def test_bf16_with_master_weights_is_fp32_training_on_rounded_weights(zero1: bool, accumulate: bool) -> None:
    param = _param(33, 5, dtype=torch.bfloat16)
    master = param.detach().float().requires_grad_()
    optimizer = ParallelOptimizer(
        torch.optim.AdamW([param], lr=1e-3),
        zero1=zero1,
        master_weights=True,
        fp32_grad_accumulation=accumulate,
    )
    reference = torch.optim.AdamW([master], lr=1e-3, fused=True)
    for step in range(10):
        grads = []
        for micro in range(3):
            leaf = param.detach().clone().requires_grad_()
            for tensor in (param, leaf):
                (torch.sin(tensor * (1 + micro)) * (step + 1)).sum().backward()
            grads.append(leaf.grad)
        if accumulate:
            assert param.grad is None
            master.grad = sum(g.float() for g in grads)  # type: ignore[assignment]
        else:
            master.grad = (grads[0] + grads[1] + grads[2]).float()
        optimizer.step()
        reference.step()
        assert torch.equal(param, master.detach().bfloat16())
    with torch.no_grad():
        param.fill_(3.0)
    optimizer.reload_master_weights()
    assert all((s.tensors["master"] == 3.0).all() for s in optimizer.export_state())


@ZERO1
def test_state_dict_round_trip_and_layout_check(zero1: bool) -> None:
    def make() -> tuple[list[nn.Parameter], ParallelOptimizer]:
        params = [_param(5), _param(4, 3, dtype=torch.bfloat16), _param()]
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.2}]
        return params, ParallelOptimizer(torch.optim.Adam(groups, lr=0.1), zero1=zero1, master_weights=True)

    params, optimizer = make()
    _backward(*params)
    optimizer.step()
    optimizer.param_groups[1]["lr"] = 0.05
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    others, other = make()
    with torch.no_grad():
        for target, source in zip(others, params, strict=True):
            target.copy_(source)
    other.load_state_dict(torch.load(stored, weights_only=True))
    assert other.param_groups[1]["lr"] == 0.05
    for optim, leaves in ((optimizer, params), (other, others)):
        _backward(*leaves)
        optim.step()
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    elsewhere = ParallelOptimizer(torch.optim.Adam([_param(5)]), zero1=not zero1)
    with pytest.raises(OptimizerError, match="written under the layout"):
        elsewhere.load_state_dict(optimizer.state_dict())
    with pytest.raises(OptimizerError, match="of a plain torch optimizer"):
        elsewhere.load_state_dict(torch.optim.Adam([_param(5)]).state_dict())


@ZERO1
def test_state_of_an_optimizer_that_has_stepped_is_taken_over(zero1: bool) -> None:
    param, twin = _param(7), _param(7)
    users, reference = torch.optim.Adam([param], lr=0.1), torch.optim.Adam([twin], lr=0.1)
    for optim, leaf in ((users, param), (reference, twin)):
        _backward(leaf)
        optim.step()
        optim.zero_grad()
    optimizer = ParallelOptimizer(users, zero1=zero1)
    for optim, leaf in ((optimizer, param), (reference, twin)):
        _backward(leaf)
        optim.step()
    assert (param - twin).abs().max() <= 1e-14


def test_export_and_import_of_state() -> None:
    params = [_param(5), _param(4, 3, dtype=torch.bfloat16)]
    optimizer = ParallelOptimizer(torch.optim.Adam(params), zero1=True, master_weights=True)
    fresh = optimizer.export_state()
    assert [(s.start, s.stop, sorted(s.tensors), s.scalars) for s in fresh] == [
        (0, 5, [], {}),
        (0, 12, ["master"], {}),
    ]
    _backward(*params)
    optimizer.step()
    states = copy.deepcopy([(s.tensors, s.scalars) for s in optimizer.export_state()])
    assert sorted(states[1][0]) == ["exp_avg", "exp_avg_sq", "master"]
    assert states[1][1] == {"step": 1.0}
    assert states[1][0]["exp_avg"].shape == (12,)
    optimizer.import_state(
        [
            ParamState(param=p, start=0, stop=p.numel(), tensors=t, scalars=s)
            for p, (t, s) in zip(params, states, strict=True)
        ]
    )
    again = optimizer.export_state()
    assert all(torch.equal(again[i].tensors[k], v) for i in range(2) for k, v in states[i][0].items())
    with pytest.raises(OptimizerError, match=r"\[1, 5\).*not a piece that this rank updates"):
        optimizer.import_state([ParamState(param=params[0], start=1, stop=5)])
    with pytest.raises(OptimizerError, match="'exp_avg' has 3 values"):
        optimizer.import_state(
            [ParamState(param=params[0], start=0, stop=5, tensors={"exp_avg": torch.zeros(3)})]
        )


def test_state_that_has_no_place_in_a_checkpoint_is_an_error() -> None:
    param = _param(4, 3)
    optimizer = ParallelOptimizer(torch.optim.Adafactor([param]), zero1=False)
    _backward(param)
    optimizer.step()
    with pytest.raises(OptimizerError, match=r"'row_var'.*save_weights_only=True"):
        optimizer.export_state()


def test_misuse_is_explained() -> None:
    param, frozen = _param(4), _param(4).requires_grad_(False)
    optimizer = ParallelOptimizer(torch.optim.SGD([param, frozen], lr=1.0), zero1=True)
    with pytest.raises(OptimizerError, match="fixed once the optimizer is wrapped"):
        optimizer.add_param_group({"params": [_param(2)]})
    with pytest.raises(OptimizerError, match="cannot be copied or pickled"):
        copy.deepcopy(optimizer)
    frozen.requires_grad_(True)
    with pytest.raises(OptimizerError, match="was frozen"):
        optimizer.step()
    frozen.requires_grad_(False)
    optimizer.optimizer.add_param_group({"params": [_param(2)]})
    with pytest.raises(OptimizerError, match="groups of the optimizer have changed"):
        optimizer.step()
    del optimizer.param_groups[1]
    param.data = param.data.clone()
    with pytest.raises(OptimizerError, match="no longer lives in the optimizer's flat buffer"):
        optimizer.step()
    with pytest.raises(OptimizerError, match="meta device"):
        ParallelOptimizer(torch.optim.SGD([nn.Parameter(torch.empty(3, device="meta"))], lr=1.0), zero1=True)
    table = nn.Embedding(4, 2, sparse=True)
    ParallelOptimizer(torch.optim.SGD(table.parameters(), lr=1.0), zero1=True)
    embedding = ParallelOptimizer(torch.optim.SGD(table.parameters(), lr=1.0), zero1=True)
    with pytest.raises(OptimizerError, match="sparse=False"):
        table(torch.tensor([1])).sum().backward()
    assert embedding.grad_norm is None


def test_a_second_optimizer_takes_over_and_the_first_one_says_so() -> None:
    param, twin = _param(4), _param(4)
    first = ParallelOptimizer(torch.optim.SGD([param], lr=1.0), zero1=True)
    second = ParallelOptimizer(torch.optim.SGD([param], lr=1.0), zero1=True)
    _backward(param)
    second.step()
    assert torch.allclose(param, twin - torch.cos(twin))
    with pytest.raises(OptimizerError, match="no longer lives"):
        first.step()


def test_nothing_of_a_dropped_optimizer_survives() -> None:
    param = _param(4)
    optimizer = ParallelOptimizer(torch.optim.SGD([param], lr=1.0), zero1=True)
    engine = weakref.ref(optimizer._engine)
    del optimizer
    gc.collect()
    assert engine() is None
    _backward(param)
    assert torch.allclose(param.grad, torch.cos(param.detach()))


class _HostSyncs(TorchDispatchMode):
    """Collects operators that would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "is_nonzero")):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@ZERO1
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_waits_for_no_device(zero1: bool, dtype: torch.dtype) -> None:
    param = _param(8, 8, dtype=dtype)
    optimizer = ParallelOptimizer(
        torch.optim.AdamW([param], lr=0.1),
        zero1=zero1,
        max_grad_norm=1.0,
        master_weights=True,
        fp32_grad_accumulation=True,
    )
    with _HostSyncs() as mode:
        for _ in range(2):
            optimizer.zero_grad()
            _backward(param)
            optimizer.step()
    assert mode.found == []
