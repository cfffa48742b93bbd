"""The memory of the host: how much a process holds, and the C library's allocator, told to keep what tensors free.

A training step on the CPU frees and allocates the same hundreds of megabytes again and again. By default glibc
hands every large block back to the kernel, which must fill the next one with zeros, page by page. Kept blocks are
reused as they are. ``docs/performance.md`` says what that is worth and what it costs.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource

_log = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "NEURON_LIGHTNING_KEEP_FREED_MEMORY"
_KEPT_BYTES = 1 << 30
"""Blocks up to this size come from the heap, and so much of the heap's end may stay unused."""

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> bool:
    """Makes this process keep freed blocks of up to 1 GiB, unless the user has tuned the allocator.

    Nothing is done where the C library is not glibc, where ``GLIBC_TUNABLES`` or ``MALLOC_*`` set the same
    thresholds, or where ``NEURON_LIGHTNING_KEEP_FREED_MEMORY=0``.

    Returns:
        Whether it was done.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE) == "0" or _tuned_by_user():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    done = bool(mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
    if done:
        _log.debug("freed memory stays with the process (%s=0 switches that off)", ENVIRONMENT_VARIABLE)
    return done


def _tuned_by_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "glibc.malloc." in tunables or any(
        name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    )


def host_memory() -> dict[str, float]:
    """Resident memory of this process in bytes, now and at its peak."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/statm", encoding="ascii") as statm:
        resident_pages = int(statm.read().split()[1])
    return {
        "allocated": float(resident_pages * resource.getpagesize()),
        "peak_allocated": float(usage.ru_maxrss * 1024),
    }
