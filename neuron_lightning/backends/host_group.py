"""A further process group for what runs beside training: objects and flags in host memory, from another thread."""

from __future__ import annotations

import time

import torch.distributed as dist

GLOO_SETTLES_S = 0.2
"""A gloo thread that has finished a collective still waits for the interpreter to free its tensors. If the
interpreter ends before it gets its turn, the process aborts ("terminate called without an active exception"):
4 of 72 processes of two on torch 2.13, destroyed groups or not, until the main thread slept first."""


def new_host_group() -> dist.ProcessGroup | None:
    """A gloo group of all ranks; None where there is one process only. Every rank calls it together."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo")
    return group


def destroy_host_group(group: dist.ProcessGroup | None) -> None:
    """Destroys it, in such a way that the process may exit right after."""
    if group is not None and dist.is_initialized():
        dist.destroy_process_group(group)
        time.sleep(GLOO_SETTLES_S)


def settle_and_destroy() -> None:
    """Destroys every process group, in such a way that the process may exit right after."""
    dist.destroy_process_group()
    time.sleep(GLOO_SETTLES_S)
