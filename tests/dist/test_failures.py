"""One rank's failure, Ctrl-C and SIGTERM end all ranks within seconds, and say why once."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.dist.test_launch import ROOT, SCRIPT, environment, finish, start, torchrun

LIMIT_S = 60
"""For a whole run with its start, on a loaded machine; the ends themselves take about three seconds."""


def plain(folder, *arguments):
    return [sys.executable, str(SCRIPT), str(folder), "--devices", "2", "--epochs", "500", *arguments]


def run_session(command):
    """In a session of its own, so that a signal to its process group reaches nobody else."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        return process.communicate(timeout=LIMIT_S)[0], process.returncode
    finally:
        process.kill()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_rank_shows_one_traceback(tmp_path, rank):
    """With torchrun around rank 0, and with nobody but ourselves to end the peers of rank 1."""
    trouble = ["--trouble", "raise", "--rank", str(rank)]
    command = torchrun(str(SCRIPT), str(tmp_path), *trouble) if rank == 0 else plain(tmp_path, *trouble)
    began = time.monotonic()
    output = finish([start(command)], code=1)
    assert time.monotonic() - began < LIMIT_S
    assert f"rank {rank} failed first:" in output
    assert output.count("in on_train_batch_start") == 1, output
    assert output.count("ValueError: the data of rank 1 is bad") <= 2, output
    if rank == 1:
        assert "rank 0 stopped: rank 1 failed first: ValueError: the data of rank 1 is bad" in output


def test_sigterm_to_one_rank_stops_all_at_a_step(tmp_path):
    output, _ = run_session(plain(tmp_path, "--trouble", "sigterm"))
    assert output.count("Stopped. No checkpoint was written") == 1, output
    assert "Traceback" not in output, output


def test_ctrl_c_says_how_to_go_on(tmp_path):
    output, code = run_session(plain(tmp_path, "--trouble", "interrupt"))
    assert code != 0, output
    assert output.count("Stopped. No checkpoint was written; start again with the same command.") == 1, output
    assert "Traceback" not in output, output
