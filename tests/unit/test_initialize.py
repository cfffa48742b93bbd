"""Initialisation in one process: statistics, what is redrawn and what is not, ties, errors."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from neuron_lightning.errors import ConfigError
from neuron_lightning.parallel import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    deferred_init,
    mark_drawn,
    materialize,
)
from neuron_lightning.parallel.drawing import Distribution, fill_box, key_of, recognise
from neuron_lightning.parallel.initialize import is_undrawn

NORMAL = Distribution("normal", 0.5, 2.0)
UNIFORM = Distribution("uniform", -1.0, 3.0)


def draw(distribution: Distribution, *shape: int, seed: int = 0, name: str = "w") -> torch.Tensor:
    full = torch.empty(shape)
    fill_box(full, shape, (0,) * len(shape), distribution, key_of(seed, name))
    return full


def test_normal_statistics() -> None:
    x = draw(NORMAL, 1000, 1001).double()
    n = x.numel()
    z = (x - 0.5) / 2.0
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for lag in (1, 2, 3, 4, 1001):
        assert abs((z.flatten()[lag:] * z.flatten()[:-lag]).mean()) < 5 / math.sqrt(n)


def test_uniform_statistics() -> None:
    x = draw(UNIFORM, 1000, 1001).double()
    n = x.numel()
    assert -1 <= x.min() < -1 + 1e-4
    assert 3 - 1e-4 < x.max() <= 3
    histogram = torch.histc(x, 64, -1, 3)
    chi_square = ((histogram - n / 64) ** 2 / (n / 64)).sum()
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)


@pytest.mark.parametrize("distribution", [NORMAL, UNIFORM])
def test_names_and_seeds_are_not_correlated(distribution: Distribution) -> None:
    a = draw(distribution, 100_000).double()
    for other in (draw(distribution, 100_000, seed=1), draw(distribution, 100_000, name="v")):
        pair = torch.stack([a, other.double()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 5 / math.sqrt(100_000)


@pytest.mark.parametrize("distribution", [NORMAL, UNIFORM])
@pytest.mark.parametrize("shape", [(7, 13), (5, 3, 2), (201,), (2, 70_001)])
def test_any_box_equals_the_slice_of_the_whole(distribution: Distribution, shape: tuple[int, ...]) -> None:
    full = draw(distribution, *shape)
    for start, stop in [(0, 1), (1, shape[0]), (shape[0] // 3, shape[0] // 2 + 1)]:
        box = torch.empty(stop - start, *shape[1:])
        fill_box(box, shape, (start, *(0,) * (len(shape) - 1)), distribution, key_of(0, "w"))
        assert torch.equal(box, full[start:stop])
    if len(shape) > 1:
        box = torch.empty(shape[0], shape[1] - 1, *shape[2:])
        fill_box(box, shape, (0, 1, *(0,) * (len(shape) - 2)), distribution, key_of(0, "w"))
        assert torch.equal(box, full[:, 1:])


PINNED = [0.94487935, 0.93843639, 0.08643162, 0.13036752]


def test_the_stream_is_pinned() -> None:
    """Weights of a given seed must not change between releases."""
    assert draw(Distribution("uniform", 0.0, 1.0), 4, seed=42).tolist() == pytest.approx(PINNED, abs=1e-7)


def test_plain_draws_are_recognised_whatever_their_wrapping() -> None:
    def nxd_style(std: float, weight: torch.Tensor) -> torch.Tensor:
        return nn.init.normal_(weight, mean=0.0, std=std)

    shape = (64, 32)
    assert recognise(functools.partial(nxd_style, 0.02), shape) == ("normal", 0.0, 0.02)
    assert recognise(lambda w: w.data.normal_(0.0, 0.3), shape) == ("normal", 0.0, 0.3)
    assert recognise(nn.init.zeros_, shape) == ("constant", 0.0, 0.0)
    assert recognise(functools.partial(nn.init.constant_, val=3.0), shape) == ("constant", 3.0, 0.0)
    bound = math.sqrt(6 / (64 + 32))
    assert recognise(nn.init.xavier_uniform_, shape) == pytest.approx(("uniform", -bound, bound))
    std = math.sqrt(2) / math.sqrt(64)
    fan_out = functools.partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
    assert recognise(fan_out, shape) == pytest.approx(("normal", 0.0, std))
    for opaque in (nn.init.orthogonal_, nn.init.trunc_normal_, lambda w: w.normal_().mul_(0.1)):
        assert recognise(opaque, shape) is None
    generator = torch.Generator()
    assert recognise(functools.partial(nn.init.normal_, generator=generator), shape) is None


def test_the_default_is_that_of_nn_linear() -> None:
    layer = ColumnParallelLinear(100, 4000)
    for param in (layer.weight, layer.bias):
        assert param.abs().max() <= 0.1
        assert param.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.05)
    row = RowParallelLinear(10_000, 300)
    assert row.bias.abs().max() <= 0.01
    assert row.bias.std().item() == pytest.approx(0.01 / math.sqrt(3), rel=0.2)


def test_layers_that_stand_alone_follow_the_seed_and_leave_torchs_generator() -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    a, b = ColumnParallelLinear(8, 8), ColumnParallelLinear(8, 8)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(a.weight, b.weight)
    torch.manual_seed(124)
    other = ColumnParallelLinear(8, 8)
    torch.manual_seed(123)
    again = ColumnParallelLinear(8, 8)
    assert torch.equal(a.weight, again.weight)
    assert not torch.equal(a.weight, other.weight)


def test_only_the_undrawn_are_drawn() -> None:
    with deferred_init():
        model = nn.ModuleDict({"a": ColumnParallelLinear(4, 4), "b": ColumnParallelLinear(4, 4)})
    model["c"] = ColumnParallelLinear(4, 4)
    with torch.no_grad():
        model["b"].weight.fill_(7.0)
    mark_drawn(model["b"].weight)
    already = model["c"].weight.clone()
    assert is_undrawn(model["a"].weight)
    assert materialize(model, seed=1) == ["a.weight", "a.bias", "b.bias"]
    assert (model["b"].weight == 7.0).all()
    assert torch.equal(model["c"].weight, already)
    assert not is_undrawn(model["a"].weight)


def test_tied_parameters_stay_tied() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict(
            {"embed": ParallelEmbedding(8, 4), "head": ColumnParallelLinear(4, 8, bias=False)}
        )
        model["head"].weight = model["embed"].weight
    assert materialize(model, seed=1) == ["embed.weight"]
    assert model["head"].weight is model["embed"].weight
    assert not model["head"].weight.is_meta
    assert hasattr(model["head"].weight, "shard_spec")


def test_modules_of_torch_are_reset_by_name() -> None:
    def build(*names: str) -> nn.ModuleDict:
        with torch.device("meta"):
            model = nn.ModuleDict({name: nn.Linear(5, 5) for name in names})
        materialize(model, seed=3)
        return model

    state = torch.get_rng_state()
    one, two = build("a", "b"), build("b")
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one["b"].weight, two["b"].weight)
    assert not torch.equal(one["a"].weight, one["b"].weight)
    assert one["a"].weight.abs().max() <= 1 / math.sqrt(5)


def test_values_beside_a_meta_parameter_are_kept() -> None:
    layer = nn.Linear(3, 3, device="meta")
    layer.bias = nn.Parameter(torch.full((3,), 5.0))
    assert materialize(layer, seed=0) == ["weight"]
    assert (layer.bias == 5.0).all()
    assert layer.weight.std() > 0


def test_batch_norm_gets_its_buffers() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm1d(4))
    assert materialize(model, seed=0) == ["0.weight", "0.bias"]
    assert (model[0].running_var == 1).all()


def test_what_nobody_can_fill_is_named() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.empty(3, device="meta"))

    with pytest.raises(ConfigError, match=r"inner\.scale.*reset_parameters"):
        materialize(nn.ModuleDict({"inner": Bare()}), seed=0)
    model = nn.ModuleDict({"inner": Bare()})
    fill = lambda m: nn.init.ones_(m.scale) if isinstance(m, Bare) else None
    assert materialize(model, seed=0, param_init_fn=fill) == ["inner.scale"]
    assert (model["inner"].scale == 1).all()


def test_the_padding_token_is_zero() -> None:
    embed = ParallelEmbedding(8, 4, padding_idx=2)
    assert not embed.weight[2].any()
    assert embed.weight[[0, 1, 3]].abs().min() > 0
