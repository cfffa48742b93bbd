"""Run functions on several ranks, in tests: ours, and users' own.

:func:`run_distributed` starts fresh ranks for one call. :class:`RankPool` keeps them warm for many. Ranks are
processes of a fork server that has imported torch, so that a start costs tenths of a second, each with one
thread, a process group on a free port, and gloo on the CPU unless told otherwise.

Example:
    >>> def check(value):
    ...     import torch, torch.distributed as dist
    ...     t = torch.tensor(float(value))
    ...     dist.all_reduce(t)
    ...     return t.item()
    >>> run_distributed(check, 2, 3)  # doctest: +SKIP
    [6.0, 6.0]
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

from neuron_lightning.errors import NeuronLightningError

_PRELOAD = ("torch", "torch.distributed", "lightning.pytorch", "torch.optim.adamw", "torch._dynamo")
"""What the fork server imports once, so that ranks start with it."""

_DONE_GRACE_S = 5.0
"""How long the other ranks may take to report after the first one failed."""


class RankFailure(NeuronLightningError, RuntimeError):
    """One or more ranks failed, died or ran out of time; the message holds every rank's traceback.

    Attributes:
        tracebacks: text by rank, of the ranks that reported an exception.
        first_rank: the rank that failed first, or None on a timeout.
    """

    def __init__(self, message: str, tracebacks: Mapping[int, str], first_rank: int | None) -> None:
        super().__init__(message)
        self.tracebacks = dict(tracebacks)
        self.first_rank = first_rank


@dataclass(frozen=True)
class _Result:
    """What a rank sends back."""

    value: Any = None
    error: str | None = None


def free_port() -> int:
    """A TCP port on this host that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    init_process_group: bool = True,
    **kwargs: Any,
) -> list[Any]:
    """Calls ``fn(*args, **kwargs)`` on ``world_size`` fresh ranks and returns their results in rank order.

    Args:
        fn: a picklable function (defined at the top level of a module).
        world_size: number of ranks.
        timeout: seconds for the whole call; afterwards all ranks are killed.
        env: extra environment of the ranks, set before anything is imported there.
        init_process_group: whether the default process group is made before ``fn`` runs. The ``RANK``,
            ``WORLD_SIZE``, ``LOCAL_RANK`` and ``MASTER_*`` variables are set in any case.

    Raises:
        RankFailure: a rank raised, died or timed out; holds every rank's traceback.
    """
    with RankPool(world_size, env=env, init_process_group=init_process_group) as pool:
        return pool.run(fn, *args, timeout=timeout, **kwargs)


class RankPool:
    """Ranks that stay up between calls; after a failure the pool restarts itself at the next call.

    Args:
        world_size: number of ranks.
        env: extra environment of the ranks.
        init_process_group: whether the default process group is made at start.
    """

    def __init__(
        self, world_size: int, *, env: Mapping[str, str] | None = None, init_process_group: bool = True
    ) -> None:
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, not {world_size}")
        self.world_size = world_size
        self._env = dict(env or {})
        self._init_process_group = init_process_group
        self._ranks: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """Calls ``fn`` on every rank; results in rank order. Raises :class:`RankFailure`."""
        if not self._ranks:
            self._start()
        payload = pickle.dumps((fn, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(payload)
        results, first = self._collect(timeout)
        errors = {r: result.error for r, result in results.items() if result.error is not None}
        if errors or len(results) < self.world_size:
            self._kill()
            raise RankFailure(self._explain(results, first, timeout), errors, first)
        return [results[rank].value for rank in range(self.world_size)]

    def close(self) -> None:
        """Ends all ranks; the pool may be used again afterwards."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(b"")
        deadline = time.monotonic() + _DONE_GRACE_S
        for rank in self._ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        self._kill()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOAD))
        port = free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            env = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.world_size),
                "LOCAL_WORLD_SIZE": str(self.world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                **self._env,
            }
            process = context.Process(
                target=_serve, args=(theirs, env, list(sys.path), self._init_process_group), daemon=True
            )
            process.start()
            theirs.close()
            self._ranks.append(process)
            self._pipes.append(ours)

    def _collect(self, timeout: float) -> tuple[dict[int, _Result], int | None]:
        deadline = time.monotonic() + timeout
        results: dict[int, _Result] = {}
        first: int | None = None
        pending = dict(enumerate(self._pipes))
        while pending and (left := deadline - time.monotonic()) > 0:
            ready = wait(list(pending.values()), timeout=left)
            for rank in [r for r, pipe in pending.items() if pipe in ready]:
                try:
                    results[rank] = pickle.loads(pending.pop(rank).recv_bytes())
                except (EOFError, ConnectionError):
                    self._ranks[rank].join(_DONE_GRACE_S)
                    code = self._ranks[rank].exitcode
                    results[rank] = _Result(error=f"the rank died without a traceback (exit code {code})")
                if results[rank].error is not None and first is None:
                    first = rank
                    deadline = min(deadline, time.monotonic() + _DONE_GRACE_S)
        return results, first

    def _explain(self, results: Mapping[int, _Result], first: int | None, timeout: float) -> str:
        lines = []
        if first is None:
            silent = [r for r in range(self.world_size) if r not in results]
            lines.append(f"timeout: after {timeout:g} s rank(s) {silent} had not finished")
        else:
            lines.append(f"rank {first} failed first")
        for rank, result in sorted(results.items(), key=lambda item: item[0] != first):
            if result.error is not None:
                lines.append(f"--- rank {rank} ---\n{result.error}")
        lines += [f"--- rank {r} --- no answer" for r in range(self.world_size) if r not in results]
        return "\n".join(lines)

    def _kill(self) -> None:
        for rank in self._ranks:
            if rank.is_alive() and rank.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGKILL)
        for rank in self._ranks:
            rank.join()
        for pipe in self._pipes:
            pipe.close()
        self._ranks, self._pipes = [], []


def _serve(pipe: Connection, env: Mapping[str, str], path: list[str], init_process_group: bool) -> None:
    """Body of a rank: calls what it is sent until it is sent nothing."""
    os.environ.update(env)
    sys.path[:] = path
    import torch
    import torch.distributed as dist

    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    if init_process_group:
        from neuron_lightning.backends import get_backend

        get_backend().init_process_group(
            rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"]), timeout=timedelta(minutes=5)
        )
    while payload := pipe.recv_bytes():
        pipe.send_bytes(_answer(payload))
    if dist.is_initialized():
        from neuron_lightning.backends import get_backend

        get_backend().destroy_process_group()


def _answer(payload: bytes) -> bytes:
    try:
        fn, args, kwargs = pickle.loads(payload)
        return pickle.dumps(_Result(value=fn(*args, **kwargs)))
    except BaseException:  # noqa: BLE001 - whatever the user's function raised is the answer
        return pickle.dumps(_Result(error=traceback.format_exc()))
