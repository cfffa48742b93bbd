"""What a process holds on to, for tests that ask whether something was left open."""

from __future__ import annotations

import contextlib
import os
import threading


def held() -> set[str]:
    """The open files, sockets, pipes and threads of this process, by what they are.

    Compare sets, not sizes: a process that has run other tests may at any time let go of what they left to the
    garbage collector.
    """
    links = {f"thread {thread.native_id} {thread.name}" for thread in threading.enumerate()}
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own, closed by now
            links.add(f"{descriptor} -> {os.readlink(f'/proc/self/fd/{descriptor}')}")
    return links
