"""A job of real processes that can be killed: each with its own output file, exit code and trace.

The processes come from a fork server that has imported torch, Lightning and this package, and from there on run as a
script would: uncaught exceptions go through ``sys.excepthook``, and exit functions run.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

PRELOAD = (
    "torch", "torch.distributed", "lightning.pytorch", "torch.optim.adamw", "torch._dynamo",
    "neuron_lightning.lightning.strategy", "tests.faults.training",
)  # fmt: skip
_LINE = 64
"""Bytes of a line in a trace, so that its length is the number of lines."""


class Trace:
    """What one rank has reached, written so that it survives the rank: a line each, with the time."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def mark(self, event: str) -> None:
        """Notes that ``event`` is reached now."""
        os.write(self._handle, f"{time.monotonic():17.6f} {event[: _LINE - 19]:<{_LINE - 19}}\n".encode())


def read_trace(path: Path) -> list[tuple[float, str]]:
    """(seconds of the monotonic clock, event) in order; nothing if the rank has not begun."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(float(line[:17]), line[18:].rstrip()) for line in lines]


def count_trace(path: Path) -> int:
    """How many events there are, cheaply."""
    try:
        return path.stat().st_size // _LINE
    except FileNotFoundError:
        return 0


def quiet_port() -> int:
    """A free port outside of the range from which the system gives ports to everybody's connections."""
    for port in random.SystemRandom().sample(range(20000, 30000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port between 20000 and 30000")


class Crew:
    """Processes of one job, started at once; to be used in a ``with``, which leaves none behind.

    Args:
        world_size: number of ranks.
        target: runs on every rank; a function of a module.
        arguments: of ``target``.
        folder: where the ranks' output goes, ``rank-N.txt``.
        env: extra environment.
    """

    def __init__(
        self,
        world_size: int,
        target: Callable[..., Any],
        *arguments: Any,
        folder: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        port = str(quiet_port())
        self._logs = [folder / f"rank-{rank}.txt" for rank in range(world_size)]
        self._ranks: list[BaseProcess] = []
        for rank in range(world_size):
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                **(env or {}),
            }
            process = context.Process(
                target=_rank_main, args=(target, arguments, variables, str(self._logs[rank]), list(sys.path))
            )
            process.start()
            self._ranks.append(process)

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        for process in self._ranks:
            process.join()

    @property
    def codes(self) -> list[int | None]:
        """Exit codes; None of a rank that runs, -9 of one that was killed."""
        return [process.exitcode for process in self._ranks]

    def signal(self, number: int, *ranks: int) -> None:
        """Sends a signal to ``ranks`` (none given: to all) that still run."""
        for rank, process in enumerate(self._ranks):
            if (not ranks or rank in ranks) and process.exitcode is None and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def wait_until(self, reached: Callable[[], bool], timeout: float) -> None:
        """Waits until ``reached``, or a rank has ended, or the time is up."""
        deadline = time.monotonic() + timeout
        while not reached() and all(code is None for code in self.codes) and time.monotonic() < deadline:
            time.sleep(0.0005)

    def wait(self, timeout: float) -> bool:
        """Waits until all have ended; whether they did within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        for process in self._ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return all(code is not None for code in self.codes)

    def wait_for(self, rank: int, timeout: float) -> int | None:
        """Waits for one rank; its exit code, None if it still runs after ``timeout`` seconds."""
        self._ranks[rank].join(timeout)
        return self._ranks[rank].exitcode

    def output(self) -> str:
        """What every rank wrote to stdout and stderr."""
        said = [
            f"--- rank {rank}, exit code {code} ---\n{log.read_text(errors='replace') if log.exists() else ''}"
            for rank, (code, log) in enumerate(zip(self.codes, self._logs, strict=True))
        ]
        return "\n".join(said)


def _rank_main(
    target: Callable[..., Any], arguments: tuple[Any, ...], env: Mapping[str, str], log: str, path: list[str]
) -> None:
    """Body of a process: as the interpreter runs a script, to the end of the process."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(env)
    sys.path[:] = path
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    import torch

    torch.set_num_threads(1)
    code = 0
    try:
        target(*arguments)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does at the top of a script
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
