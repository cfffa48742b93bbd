"""Freed memory stays with the process where the CPU backend is in use, and nowhere else."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PAGES = 64 << 20 >> 12
"""Pages of the block that the program below allocates again and again."""

PROGRAM = """
import ctypes, resource
import torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page is one fault where it is 512
torch.set_num_threads(1)
from neuron_lightning.backends import get_backend
get_backend()
def touch():
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
touch(); touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> int:
    """Page faults of four allocations of a size that was freed just before."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")
    }
    clean |= {"NEURON_LIGHTNING_BACKEND": "cpu", **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean, capture_output=True, text=True, check=True, timeout=120
    )
    return int(done.stdout)


pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt(3) is glibc's")


def test_freed_blocks_are_used_again() -> None:
    assert faults() < PAGES


@pytest.mark.parametrize(
    "environment",
    [
        {"NEURON_LIGHTNING_KEEP_FREED_MEMORY": "0"},
        {"MALLOC_MMAP_THRESHOLD_": "1048576"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576"},
    ],
)
def test_the_users_word_counts(environment: dict[str, str]) -> None:
    assert faults(**environment) >= 4 * PAGES // 2
