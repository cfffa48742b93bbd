"""The compiler `neuron` is as strict as TorchNeuron's is documented to be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from neuron_lightning.backends.native import NativeBackend


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs() -> list[object]:
    from neuron_sim import dynamo

    return dynamo.graphs


def recompiles() -> list[object]:
    from neuron_sim import dynamo

    return dynamo.recompiles()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1)).to("neuron")


def test_pytorch_finds_the_compiler_by_its_name() -> None:
    assert "neuron" in torch._dynamo.list_backends(exclude_tags=None)


def test_a_compiled_module_computes_the_same_and_its_second_shape_is_a_recompile() -> None:
    eager = net()
    compiled = NativeBackend("neuron").compile(eager)
    x = torch.randn(2, 4, device="neuron")
    before = len(recompiles())
    for _ in range(3):
        torch.testing.assert_close(compiled(x), eager(x))
    assert len(recompiles()) == before
    compiled(torch.randn(5, 4, device="neuron"))
    assert len(recompiles()) == before + 1
    assert (5, 4) in graphs()[-1].shapes
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in eager.parameters())


def test_dynamic_shapes_are_refused() -> None:
    compiled = torch.compile(net(), backend="neuron", dynamic=True)
    with pytest.raises(Exception, match="needs static shapes"):
        compiled(torch.randn(3, 4, device="neuron"))


def test_unknown_options_are_refused() -> None:
    compiled = torch.compile(net(), backend="neuron", options={"speed": 11})
    with pytest.raises(Exception, match="knows no options"):
        compiled(torch.randn(3, 4, device="neuron"))
