"""The torch_xla façade on ranks: the same results as torch.distributed over those ranks."""

from __future__ import annotations

import functools
import operator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from neuron_lightning.compat import xm
from neuron_lightning.errors import ParallelStateError
from neuron_lightning.optim import ParallelOptimizer
from neuron_lightning.parallel import parallel_state
from neuron_lightning.testing import RankPool
from tests.devices import layout

Rows = list[Any]


def value_of(rank: int) -> torch.Tensor:
    """(2, 4) float64, different on every rank."""
    return torch.arange(8, dtype=torch.float64).reshape(2, 4) + 10 * rank + 1


def on_layout(tp: int, body: str, *args: Any) -> Any:
    """Runs one of the functions below on a layout with this tensor-parallel size."""
    with layout(tensor_model_parallel_size=tp):
        return globals()[body](*args)


def reduce_everywhere(kind: str) -> dict[str, Rows]:
    """Each reduction over tp, dp and all ranks; out of place and in place, by rank lists and process group."""
    rank = dist.get_rank()
    results = {}
    for name, getter in (
        ("tp", parallel_state.get_tensor_model_parallel_group),
        ("dp", parallel_state.get_data_parallel_group),
    ):
        mine = value_of(rank)
        by_lists = xm.all_reduce(kind, mine, 0.5, groups=getter(as_list=True))
        by_handle = xm.all_reduce(kind, mine, 0.5, groups=getter())
        in_place = [value_of(rank).t(), value_of(rank)]
        xm.all_reduce(kind, in_place, 0.5, groups=getter(as_list=True), pin_layout=False)
        results[name] = [mine, by_lists, by_handle, in_place[0].t(), in_place[1]]
    results["world"] = [value_of(rank), xm.all_reduce(kind, value_of(rank), 0.5)]
    return results


@pytest.mark.parametrize("kind", [xm.REDUCE_SUM, xm.REDUCE_MUL, xm.REDUCE_MIN, xm.REDUCE_MAX])
def test_reductions_equal_those_over_the_same_ranks(pool4: RankPool, kind: str) -> None:
    combine = {"sum": torch.add, "mul": torch.mul, "min": torch.minimum, "max": torch.maximum}[kind]
    rows = pool4.run(on_layout, 2, "reduce_everywhere", kind)
    groups = {"tp": [[0, 1], [2, 3]], "dp": [[0, 2], [1, 3]], "world": [[0, 1, 2, 3]]}
    for rank, by_group in enumerate(rows):
        for name, (untouched, *reduced) in by_group.items():
            ranks = next(g for g in groups[name] if rank in g)
            wanted = functools.reduce(combine, [value_of(r) for r in ranks]) * 0.5
            assert torch.equal(untouched, value_of(rank))
            assert all(torch.equal(got, wanted) for got in reduced)


def reduce_bits(kind: str) -> Rows:
    """Integers and bools over all ranks."""
    rank = dist.get_rank()
    flags = torch.tensor([True, rank > 0, False, rank == 1])
    return [xm.all_reduce(kind, torch.tensor([12 + rank, 7])).tolist(), xm.all_reduce(kind, flags).tolist()]


@pytest.mark.parametrize(("kind", "combine"), [(xm.REDUCE_AND, operator.and_), (xm.REDUCE_OR, operator.or_)])
def test_bitwise_reductions(pool2: RankPool, kind: str, combine: Any) -> None:
    wanted_flags = [True, combine(False, True), False, combine(False, True)]
    for integers, flags in pool2.run(reduce_bits, kind):
        assert integers == [combine(12, 13), 7]
        assert flags == wanted_flags


def gather_and_scatter() -> dict[str, torch.Tensor]:
    """Gathers and scatters over the data-parallel ranks, along both dimensions."""
    rank, groups = dist.get_rank(), parallel_state.get_data_parallel_group(as_list=True)
    output = torch.empty(2, 8, dtype=torch.float64)
    assert xm.all_gather(value_of(rank), dim=1, groups=groups, output=output) is output
    return {
        "rows": xm.all_gather(value_of(rank), groups=groups),
        "columns": output,
        "sum_1": xm.reduce_scatter(xm.REDUCE_SUM, value_of(rank), 0.5, 1, 2, groups=groups),
        "sum_0": xm.reduce_scatter(xm.REDUCE_SUM, value_of(rank), 1.0, 0, 2, groups=groups),
        "max_1": xm.reduce_scatter(xm.REDUCE_MAX, value_of(rank), 1.0, -1, 2, groups=groups),
    }


def test_gather_and_reduce_scatter(pool4: RankPool) -> None:
    for rank, got in enumerate(pool4.run(on_layout, 2, "gather_and_scatter")):
        ranks = [r for r in range(4) if r % 2 == rank % 2]
        place, values = ranks.index(rank), [value_of(r) for r in ranks]
        total = values[0] + values[1]
        assert torch.equal(got["rows"], torch.cat(values))
        assert torch.equal(got["columns"], torch.cat(values, dim=1))
        assert torch.equal(got["sum_1"], total.chunk(2, dim=1)[place] * 0.5)
        assert torch.equal(got["sum_0"], total.chunk(2)[place])
        assert torch.equal(got["max_1"], values[1].chunk(2, dim=1)[place])


def ask_for_unknown_groups() -> list[str]:
    """The errors for groups that do not exist."""
    said = []
    for groups in ([[0, 3], [1, 2]], [[0, 1]], [[1, 0], [3, 2]]):
        with pytest.raises(ParallelStateError) as error:
            xm.all_reduce(xm.REDUCE_SUM, torch.ones(1), groups=groups)
        said.append(str(error.value))
    alone = xm.all_reduce(xm.REDUCE_SUM, torch.ones(1), groups=[[0], [1], [2], [3]])
    world = xm.all_reduce(xm.REDUCE_SUM, torch.ones(1), groups=[[0, 1, 2, 3]])
    return [*said, f"{alone.item()} {world.item()}"]


def test_unknown_groups_are_errors_that_name_the_groups(pool4: RankPool) -> None:
    for *said, sums in pool4.run(on_layout, 2, "ask_for_unknown_groups"):
        for message in said:
            assert "world [[0, 1, 2, 3]]; tp [[0, 1], [2, 3]]; dp [[0, 2], [1, 3]]" in message
        assert sums == "1.0 4.0"


def who_am_i() -> Rows:
    """Ordinals, payloads and objects of all ranks; mismatching tags."""
    rank = dist.get_rank()
    with pytest.raises(ParallelStateError, match="at 'tag-"):
        xm.rendezvous(f"tag-{rank}")
    return [
        (xm.get_ordinal(), xm.get_local_ordinal(), xm.xrt_world_size(), xm.is_master_ordinal(local=False)),
        xm.rendezvous("here", str(rank).encode()),
        xm.mesh_reduce("max", torch.tensor(rank), max).item(),
    ]


def test_ranks_meet(pool2: RankPool) -> None:
    assert pool2.run(who_am_i) == [
        [(0, 0, 2, True), [b"0", b"1"], 1],
        [(1, 1, 2, False), [b"0", b"1"], 1],
    ]


def step_both_kinds() -> Rows:
    """One SGD step of a plain optimizer and of one that reduces by itself, on gradients that differ by rank."""
    rank, results = dist.get_rank(), []
    for wrapped in (False, True):
        weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        plain = torch.optim.SGD([weight], lr=1.0)
        optimizer = ParallelOptimizer(plain, zero1=True) if wrapped else plain
        (weight * (rank + 1)).sum().backward()
        xm.optimizer_step(optimizer, groups=parallel_state.get_data_parallel_group(as_list=True))
        results.append(weight.tolist())
    with pytest.raises(ParallelStateError, match="leave groups out"):
        xm.optimizer_step(optimizer, groups=[[0], [1]])
    return results


def test_optimizer_step_averages_once(pool2: RankPool) -> None:
    for plain, parallel in pool2.run(on_layout, 1, "step_both_kinds"):
        assert plain == [-1.5] * 3
        assert parallel == [-1.5] * 3
