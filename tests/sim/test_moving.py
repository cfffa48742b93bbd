"""A module comes to the device and back as the one it was: PyTorch's own ``to`` would put other parameters in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from neuron_lightning.parallel.move import move_module

NEURON = torch.device("neuron", 0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("count", torch.tensor(4))
        self.one.weight.tag = "kept"


def test_parameters_stay_the_same_objects_with_all_that_is_attached_to_them() -> None:
    module = Tied()
    before = dict(module.named_parameters())
    values = {name: param.detach().clone() for name, param in before.items()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module.one(torch.ones(1, 3)).sum().backward()
    grad = module.one.weight.grad.clone()
    for device in (NEURON, torch.device("cpu"), NEURON):
        move_module(module, device)
        after = dict(module.named_parameters())
        assert all(after[name] is param for name, param in before.items())
        assert {param.device for param in after.values()} == {device}
        assert all(torch.equal(after[name].cpu(), value) for name, value in values.items())
        assert module.two.weight is module.one.weight
        assert module.one.weight.tag == "kept"
        assert torch.equal(module.one.weight.grad.cpu(), grad)
        assert module.one.weight.grad.device == module.count.device == device
        assert not module.frozen.requires_grad
    optimizer.step()
    assert not torch.equal(module.one.weight.cpu(), values["one.weight"])


def test_hooks_on_parameters_move_along() -> None:
    module, called = nn.Linear(3, 1), []
    module.weight.register_post_accumulate_grad_hook(lambda param: called.append(param.device.type))
    module(torch.ones(1, 3)).sum().backward()
    move_module(module, NEURON)
    module(torch.ones(1, 3, device=NEURON)).sum().backward()
    assert called == ["cpu", "neuron"]


def test_pytorchs_own_move_would_not_do() -> None:
    module = Tied()
    weight = module.one.weight
    module.to(NEURON)
    if module.one.weight is weight:
        pytest.fail("PyTorch keeps parameters now: move_module may be simpler")
