"""Parameter groups, schedules, and NxD's way to an optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from neuron_lightning.errors import ConfigError, OptimizerError
from neuron_lightning.optim import (
    ParallelOptimizer,
    get_constant_schedule,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_param_groups_by_weight_decay,
    initialize_parallel_optimizer,
    wrap_optimizer,
)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.input_layernorm = nn.LayerNorm(4)
        self.gain = nn.Parameter(torch.ones(4))
        self.table = nn.Parameter(torch.ones(4, 4))
        self.norm_matrix = nn.Parameter(torch.ones(2, 2))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.tied = self.table


def _names(module: nn.Module, group: dict[str, Any]) -> list[str]:
    names = {id(p): n for n, p in module.named_parameters()}
    return [names[id(p)] for p in group["params"]]


def test_groups_by_weight_decay() -> None:
    block = _Block()
    decayed, exempt = get_param_groups_by_weight_decay(block, weight_decay=0.3)
    assert _names(block, decayed) == ["table", "proj.weight"]
    assert _names(block, exempt) == [
        "gain",
        "norm_matrix",
        "proj.bias",
        "input_layernorm.weight",
        "input_layernorm.bias",
    ]
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)


def test_groups_take_the_users_list_and_keep_an_empty_group() -> None:
    block = _Block()
    decayed, exempt = get_param_groups_by_weight_decay(
        block.named_parameters(remove_duplicate=False), no_decay=["table"], exempt_1d=False
    )
    assert _names(block, exempt) == ["table"]
    assert len(decayed["params"]) == 6
    everything, nothing = get_param_groups_by_weight_decay(block, no_decay=(), exempt_1d=False)
    assert len(everything["params"]) == 7
    assert nothing["params"] == []


def _rates(make: Any, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_schedules() -> None:
    assert _rates(get_constant_schedule, 3) == [2.0] * 3
    assert _rates(lambda o: get_constant_schedule_with_warmup(o, 2), 4) == [0.0, 1.0, 2.0, 2.0]
    linear = _rates(lambda o: get_linear_schedule_with_warmup(o, 2, 6, min_lr_ratio=0.5), 8)
    assert linear == pytest.approx([0.0, 1.0, 2.0, 1.75, 1.5, 1.25, 1.0, 1.0])
    cosine = _rates(lambda o: get_cosine_schedule_with_warmup(o, 1, 5, min_lr_ratio=0.1), 7)
    assert cosine == pytest.approx(
        [0.0, 2.0, 0.2 + 1.8 * 0.8535533905932737, 1.1, 0.2 + 1.8 * 0.1464466094, 0.2, 0.2]
    )


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_are_those_of_transformers(kind: str) -> None:
    theirs = pytest.importorskip("transformers.optimization")
    name = f"get_{kind}_schedule_with_warmup"
    ours = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}[kind]
    expected = _rates(lambda o: getattr(theirs, name)(o, 3, 17), 18)  # afterwards their cosine rises again
    assert _rates(lambda o: ours(o, 3, 17), 18) == pytest.approx(expected)


def test_a_warmup_longer_than_training_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigError, match="5 training steps with 9 warm-up steps"):
        get_linear_schedule_with_warmup(optimizer, 9, 5)


def _config(zero1: bool, **precision: Any) -> dict[str, Any]:
    return {
        "optimizer_config": {"zero_one_enabled": zero1, "grad_clipping": True, "max_grad_norm": 0.5},
        "mixed_precision_config": precision,
    }


@pytest.mark.parametrize(
    ("config", "zero1", "clip", "master", "accumulation"),
    [
        (_config(True), True, 0.5, True, torch.float32),
        (_config(False), False, 0.5, False, torch.bfloat16),
        (_config(False, use_master_weights=True, use_fp32_grad_acc=None), False, 0.5, True, torch.bfloat16),
        (_config(True, use_master_weights=False, use_fp32_grad_acc=False), True, 0.5, False, torch.bfloat16),
        (
            {"optimizer_config": {"grad_clipping": False}, "mixed_precision_config": None},
            False,
            None,
            False,
            None,
        ),
        ({}, False, 1.0, False, None),
    ],
)
def test_initialize_parallel_optimizer_reads_the_config(
    config: dict[str, Any], zero1: bool, clip: float | None, master: bool, accumulation: torch.dtype | None
) -> None:
    params = [nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(3))]
    optimizer = initialize_parallel_optimizer(config, torch.optim.AdamW, params, 0.1, weight_decay=0.2)
    assert (optimizer.zero1, optimizer.max_grad_norm) == (zero1, clip)
    narrow, wide = optimizer._engine.buckets
    assert (narrow.master is not None, wide.master is not None) == (master, False)
    assert narrow.grads.dtype == (accumulation or torch.bfloat16)
    assert wide.grads.dtype == torch.float32
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.1, 0.2)


def test_weight_decay_beside_groups_means_what_it_means_in_torch() -> None:
    block = _Block()
    groups = [{"params": [block.table], "weight_decay": 0.7}, {"params": [block.gain]}]
    optimizer = initialize_parallel_optimizer(
        _config(True), torch.optim.AdamW, groups, lr=0.1, weight_decay=0.2
    )
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.7, 0.2]


def test_wrapping_twice_and_wrapping_nonsense() -> None:
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    wrapped = wrap_optimizer(inner, zero1=False)
    assert wrap_optimizer(wrapped, zero1=True) is wrapped
    with pytest.raises(
        OptimizerError, match=r"wraps a torch\.optim\.Optimizer instance, not a ParallelOptimizer"
    ):
        ParallelOptimizer(wrapped, zero1=False)
    with pytest.raises(OptimizerError, match=r"max_grad_norm must be positive.*not 0"):
        ParallelOptimizer(
            torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1), zero1=False, max_grad_norm=0
        )
