"""Moving a module keeps its parameters; ``meta`` is another kind of device, as ``neuron`` is."""

from __future__ import annotations

import torch
from torch import nn

from neuron_lightning.parallel.move import move_module


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.register_buffer("count", torch.tensor(4))


def test_parameters_stay_the_same_objects_with_all_that_is_attached_to_them() -> None:
    module, called = Tied(), []
    before = dict(module.named_parameters())
    module.one.weight.tag = "kept"
    module.one.weight.register_post_accumulate_grad_hook(called.append)
    module.one(torch.ones(1, 3)).sum().backward()
    move_module(module, torch.device("meta"))
    after = dict(module.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is param for name, param in before.items())
    assert {param.device.type for param in after.values()} == {"meta"}
    assert module.one.weight.grad.device.type == module.count.device.type == "meta"
    assert module.two.weight is module.one.weight
    assert module.one.weight.tag == "kept"
    module.one(torch.ones(1, 3, device="meta")).sum().backward()
    assert [param is module.one.weight for param in called] == [True, True]


def test_what_is_there_already_is_left_alone() -> None:
    module = Tied()
    memory = [param.data_ptr() for param in module.parameters()]
    move_module(module, torch.device("cpu"))
    assert [param.data_ptr() for param in module.parameters()] == memory
