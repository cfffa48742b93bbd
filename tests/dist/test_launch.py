"""Every way of starting ranks gives the same run: same losses, every sample once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dist import strategy_cases as cases

SCRIPT = Path(__file__).with_name("launch_script.py")
ROOT = SCRIPT.parents[2]
TIMEOUT_S = 180


def environment(**extra):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC", "PL_"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        clean.pop(name, None)
    return {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **extra}


def start(command, **extra):
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**extra), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )  # fmt: skip


def finish(processes, code=0):
    """Output of all processes, which must end by themselves; what they said is shown if they do not."""
    deadline, late = time.monotonic() + TIMEOUT_S, []
    output = []
    for process in processes:
        try:
            output.append(process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            late.append(process.pid)
            process.kill()
            output.append(process.communicate()[0])
    text = "".join(f"--- process {n} ---\n{said}" for n, said in enumerate(output))
    assert not late, f"{len(late)} of {len(processes)} did not end within {TIMEOUT_S} s\n{text}"
    codes = [process.returncode for process in processes]
    assert all((c == 0) == (code == 0) for c in codes), f"{codes}\n{text}"
    return text


def quiet_port():
    """A free port outside of the range from which the system gives ports to everybody's connections."""
    for port in random.sample(range(20000, 30000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port between 20000 and 30000")


def torchrun(*arguments, nproc=2):
    return [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}", f"--master-port={quiet_port()}",
        *arguments,
    ]  # fmt: skip


def results(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


def check(folder, world, nodes):
    ranks = results(folder)
    assert [(r["world"], r["nodes"], r["devices"]) for r in ranks] == [(world, nodes, world // nodes)] * world
    assert sorted(i for r in ranks for i in r["ids"]) == list(range(cases.SAMPLES))
    assert ranks[0]["steps"] == 4
    assert ranks[0]["losses"] == pytest.approx(LOSSES, rel=1e-12)


LOSSES: list[float] = []
"""Of the first way of launching; every other way must give the same, at any number of ranks.

Lightning's sampler deals samples out by rank, so that the global batches do not depend on their number.
"""


@pytest.fixture(scope="module", autouse=True)
def plain_python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    finish([start([sys.executable, str(SCRIPT), str(folder), "--devices", "2"])])
    LOSSES[:] = results(folder)[0]["losses"]
    assert len(LOSSES) == 4
    check(folder, 2, 1)


def test_torchrun(tmp_path):
    finish([start(torchrun(str(SCRIPT), str(tmp_path)))])
    check(tmp_path, 2, 1)


def test_two_torchrun_agents_are_two_nodes(tmp_path):
    port = quiet_port()
    common = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2",
        "--master-addr=127.0.0.1", f"--master-port={port}",
    ]  # fmt: skip
    finish([start([*common, f"--node-rank={n}", str(SCRIPT), str(tmp_path)]) for n in range(2)])
    check(tmp_path, 4, 2)


def test_slurm_made_by_hand(tmp_path):
    port = str(quiet_port())
    processes = [
        start(
            [sys.executable, str(SCRIPT), str(tmp_path)],
            SLURM_NTASKS="2", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_NODEID="0", SLURM_NNODES="1",
            SLURM_JOB_ID="4711", SLURM_NODELIST="127.0.0.1", MASTER_PORT=port,
        )
        for rank in range(2)
    ]  # fmt: skip
    finish(processes)
    check(tmp_path, 2, 1)


def test_devices_that_contradict_torchrun(tmp_path):
    output = finish([start(torchrun(str(SCRIPT), str(tmp_path), "--devices", "4"))], code=1)
    assert "Trainer(devices=4) asks for 4 process(es) per node, but torchrun started 2 on this node" in output


def test_world_size_not_divisible_by_tp(tmp_path):
    output = finish([start(torchrun(str(SCRIPT), str(tmp_path), "--tp", "3"))], code=1)
    assert "world size 2 is not divisible by tensor_parallel_size 3" in output
