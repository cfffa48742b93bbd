"""XLA's own collectives: what the recorded graphs say, on every rank. They are not run: that takes several devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from neuron_lightning.errors import ParallelStateError
from neuron_lightning.testing import RankPool
from tests.xla import trace
from tests.xla.pool import XLA

TP, DP = "{{0,1},{2,3}}", "{{0,2},{1,3}}"


def test_collectives_name_all_groups_of_their_kind(xla4: RankPool) -> None:
    everyone = xla4.run(trace.each_collective, 2, timeout=120)
    assert everyone[0] == everyone[1] == everyone[2] == everyone[3]
    for name, hlo in everyone[0].items():
        axis, _, kind = name.partition(" ")
        assert (kind, TP if axis == "tp" else DP) in trace.collectives(hlo), name


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("zero1", [True, False])
def test_every_rank_records_the_same_graphs(xla4: RankPool, zero1: bool, sequence_parallel: bool) -> None:
    """So that the compiler is asked once for all of them, and collectives meet."""
    everyone = xla4.run(trace.training_step, 2, zero1, sequence_parallel, timeout=300)
    for forward, step in everyone[1:]:
        assert forward == everyone[0][0]
        assert step == everyone[0][1]
    kinds = {groups for _, groups in trace.collectives(everyone[0][0])}
    assert kinds == {TP}  # forward and backward talk to tensor-parallel neighbours only
    of_step = trace.collectives(everyone[0][1])
    assert (("reduce-scatter", DP) in of_step) == zero1
    assert (("all-gather", DP) in of_step) == zero1


def test_a_rank_whose_slice_is_padding_records_the_same_graph(xla4: RankPool) -> None:
    """Over four ranks the bucket of norms is so small that the last rank's slice holds nothing."""
    everyone = xla4.run(trace.training_step, 1, True, False, timeout=300)
    assert all(step == everyone[0][1] for _, step in everyone)
    assert "reduce-scatter" in everyone[0][1]


def test_a_world_that_xla_does_not_share_is_refused(xla2: RankPool) -> None:
    assert all(
        "torch.distributed has 2 rank(s) but XLA's world has 3" in text for text in xla2.run(_other_world)
    )


def _other_world() -> str:
    from unittest import mock

    import torch_xla.runtime as xr

    from neuron_lightning.backends.xla import XLABackend

    with mock.patch.object(xr, "world_size", return_value=3), pytest.raises(ParallelStateError) as caught:
        XLABackend()._choose_collectives()
    return str(caught.value)


def test_neuron_without_its_plugin_is_explained() -> None:
    code = "from neuron_lightning.backends import get_backend; get_backend()"
    env = {**os.environ, "PJRT_DEVICE": "NEURON"}
    env.pop("NEURON_LIGHTNING_BACKEND", None)
    answer = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert answer.returncode
    assert "ConfigError: PJRT_DEVICE=NEURON means Neuron cores through torch-xla" in answer.stderr


SPMD = """
import numpy, torch, torch_xla, torch_xla.runtime as xr, torch_xla.distributed.spmd as xs
xr.use_spmd()
assert xr.global_runtime_device_count() == 2
from neuron_lightning.parallel.layers import ColumnParallelLinear, RowParallelLinear
torch.manual_seed(0)
up, down = ColumnParallelLinear(16, 32, bias=False, gather_output=False), RowParallelLinear(32, 16, bias=False, input_is_parallel=True)
from neuron_lightning.parallel.initialize import materialize
block = torch.nn.Sequential(up, torch.nn.SiLU(), down)
materialize(block, 1)
x = torch.randn(8, 16)
expected = block(x).detach()
expected.shape
block.to(torch_xla.device())
mesh = xs.Mesh(numpy.arange(2), (1, 2), ("dp", "tp"))
xs.mark_sharding(up.weight, mesh, ("tp", None))
xs.mark_sharding(down.weight, mesh, (None, "tp"))
out = block(x.to(torch_xla.device()))
torch_xla.sync()
print("deviation", float((out.cpu() - expected).abs().max()))
"""


def test_one_block_on_two_devices_of_one_process_is_reduced_once(tmp_path: Path) -> None:
    """GSPMD cuts the block's two products as our layers do by hand: one all-reduce, and no other collective."""
    env = {
        **os.environ,
        **XLA,
        "CPU_NUM_DEVICES": "2",
        "XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text",
    }
    answer = subprocess.run(
        [sys.executable, "-c", SPMD], env=env, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert float(answer.stdout.split("deviation")[1]) < 1e-5
    optimized = [path.read_text() for path in tmp_path.glob("*after_optimizations.txt")]
    with_collectives = [trace.any_collectives(text) for text in optimized]
    assert [found for found in with_collectives if found] == [["all-reduce"]]
