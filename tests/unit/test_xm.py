"""The torch_xla façade in one process: what it returns without ranks, closures, output, random state, errors."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from neuron_lightning.compat import xm
from neuron_lightning.errors import ConfigError, ParallelStateError


def test_one_process_is_master_of_a_world_of_one() -> None:
    assert (xm.get_ordinal(), xm.get_local_ordinal(), xm.xrt_world_size()) == (0, 0, 1)
    assert xm.is_master_ordinal()
    assert xm.is_master_ordinal(local=False)
    assert xm.xrt_world_size(defval=3) == 3
    assert xm.xla_device() == torch.device("cpu")


def test_before_the_process_group_the_launcher_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (xm.get_ordinal(), xm.get_local_ordinal(), xm.xrt_world_size()) == (5, 1, 8)
    assert not xm.is_master_ordinal()
    stream = io.StringIO()
    xm.master_print("hello", fd=stream)
    assert stream.getvalue() == ""


def test_all_reduce_of_a_tensor_is_new_and_of_a_list_in_place() -> None:
    x = torch.ones(2, requires_grad=True)
    doubled = xm.all_reduce(xm.REDUCE_SUM, x, scale=2.0)
    assert doubled.tolist() == [2.0, 2.0]
    assert not doubled.requires_grad
    assert x.tolist() == [1.0, 1.0]
    column = torch.ones(3, 2)[:, 0]
    assert xm.all_reduce(xm.REDUCE_SUM, [column], scale=0.5) is None
    assert column.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("groups", [None, [], [[0]]])
def test_groups_of_one_rank(groups: list[list[int]] | None) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(xm.all_gather(x, dim=1, groups=groups), x)
    assert torch.equal(xm.reduce_scatter(xm.REDUCE_SUM, x, 1.0, 1, 1, groups=groups), x)


@pytest.mark.parametrize("groups", [[[0, 1]], [[1]]])
def test_an_unknown_group_names_those_that_exist(groups: list[list[int]]) -> None:
    with pytest.raises(ParallelStateError, match=r"groups that exist are world \[\[0\]\]"):
        xm.all_reduce(xm.REDUCE_SUM, torch.ones(1), groups=groups)


def test_groups_of_a_wrong_kind_are_refused() -> None:
    with pytest.raises(ParallelStateError, match="list of rank lists"):
        xm.all_reduce(xm.REDUCE_SUM, torch.ones(1), groups=[0, 1])  # type: ignore[list-item]


def test_unknown_and_unfit_reductions_are_refused() -> None:
    with pytest.raises(ConfigError, match="one of sum, mul, min, max, and, or"):
        xm.all_reduce("avg", torch.ones(1))
    with pytest.raises(ConfigError, match=r"bitwise and needs integers or bools, not torch.float32"):
        xm.all_reduce(xm.REDUCE_OR, torch.ones(1))


def test_reduce_scatter_checks_the_number_of_shards() -> None:
    with pytest.raises(ConfigError, match="shard_count is 2, the group has 1 ranks"):
        xm.reduce_scatter(xm.REDUCE_SUM, torch.ones(4), 1.0, 0, 2)


def test_closures_run_in_order_at_the_step() -> None:
    seen: list[int] = []
    xm.add_step_closure(seen.append, (1,))
    xm.add_step_closure(seen.append, (2,))
    assert seen == []
    xm.mark_step()
    assert seen == [1, 2]
    xm.mark_step()
    assert seen == [1, 2]


def test_background_closures_see_the_values_of_their_step() -> None:
    loss, seen = torch.ones(1), []
    for step in range(3):
        loss.fill_(step)
        xm.add_step_closure(lambda value: seen.append(value.item()), (loss,), run_async=True)
        xm.mark_step()
    xm.mark_step(wait=True)
    assert seen == [0.0, 1.0, 2.0]


def test_an_error_in_a_background_closure_is_raised_later() -> None:
    xm.add_step_closure(int, ("no number",), run_async=True)
    with pytest.raises(ValueError, match="no number"):
        xm.mark_step(wait=True)
    xm.mark_step(wait=True)


def test_master_print_writes_one_line() -> None:
    stream = io.StringIO()
    xm.master_print("loss", 1.5, fd=stream, flush=True)
    assert stream.getvalue() == "loss 1.5\n"


def test_save_moves_to_the_host_and_keeps_the_structure(tmp_path: Path) -> None:
    data = {"weights": {"w": torch.arange(3.0, requires_grad=True)}, "step": 4, "pair": (torch.ones(1), "a")}
    xm.save(data, tmp_path / "data.pt")
    loaded = torch.load(tmp_path / "data.pt", weights_only=True)
    assert loaded["step"] == 4
    assert loaded["weights"]["w"].tolist() == [0.0, 1.0, 2.0]
    assert loaded["pair"][1] == "a"


def test_random_state_is_restored() -> None:
    state = xm.get_rng_state()
    first = torch.rand(4)
    xm.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    xm.set_rng_state(7)
    seeded = torch.rand(4)
    xm.set_rng_state(7)
    assert torch.equal(torch.rand(4), seeded)
    xm.set_rng_state(state)


def test_rendezvous_and_mesh_reduce_alone() -> None:
    assert xm.rendezvous("start", b"x") == [b"x"]
    assert xm.mesh_reduce("sum", 3, sum) == 3
    with pytest.raises(ParallelStateError, match="all 1 ranks"):
        xm.rendezvous("start", replicas=[0, 1])


def test_optimizer_step_steps_and_ends_the_step() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    weight.grad = torch.ones(2)
    seen: list[str] = []
    xm.add_step_closure(seen.append, ("end",))
    xm.optimizer_step(optimizer, barrier=True)
    assert weight.tolist() == [0.5, 0.5]
    assert seen == ["end"]


def test_a_device_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="devkind is 'TPU'"):
        xm.xla_device(devkind="TPU")
