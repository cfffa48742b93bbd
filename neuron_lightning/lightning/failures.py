"""One rank's failure ends all ranks within seconds, with one traceback: that of the rank that failed first.

The first rank whose exception reaches the top writes its name into the store of the default process group. The
others print one line instead of a traceback. A thread on every rank looks into the store, because a rank that
waits in a collective may never notice on its own that its peer is gone.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from neuron_lightning.checkpoint.folder import is_checkpoint, read_trainer_state
from neuron_lightning.errors import NeuronLightningError

_log = logging.getLogger(__name__)

_FIRST = "neuron_lightning/first_failure"
_SEEN = "neuron_lightning/failure_seen"
_STORE_GONE = "rank 0 failed first (the store that it holds is gone)"
_POLL_S = 0.5
_OWN_GRACE_S = 2.0
"""How long a rank that learns of a failure may take to end by itself."""
_FAREWELL_S = 5.0
"""How long the first rank keeps the store open for the others to read its name."""
_LOST_STORE_S = 25.0
"""How long a rank may go on after the process that holds the store is gone."""


class _State:
    """The one holder of what the excepthook and the watcher need."""

    previous_hook: Any = None
    rank: int = 0
    store: Any = None
    watcher: _Watcher | None = None
    advice: Callable[[], str] | None = None


def install(rank: int) -> None:
    """Puts the excepthook in place, once, and notes this process' rank."""
    _State.rank = rank
    if _State.previous_hook is None:
        _State.previous_hook = sys.excepthook
        sys.excepthook = _excepthook


def watch(advice: Callable[[], str]) -> None:
    """Starts looking for other ranks' failures; needs the default process group.

    Args:
        advice: text that rank 0 adds when another rank's failure ends it.
    """
    _State.advice = advice
    if _State.watcher is not None or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    # torch has no public way to the store behind init_process_group(); checked against torch 2.9 to 2.13.
    _State.store = dist.distributed_c10d._get_default_store()
    _State.watcher = _Watcher(_State.store.clone())
    _State.watcher.start()
    atexit.register(stop_watching)


def stop_watching() -> None:
    """Stops the thread; a failure after this ends only its own rank."""
    watcher, _State.watcher = _State.watcher, None
    if watcher is not None:
        watcher.stop()


def report_interrupt(trainer: Trainer, exception: BaseException) -> None:
    """On Ctrl-C and SIGTERM: tells the other ranks, and says on rank 0 how to go on. Runs no collective."""
    if isinstance(exception, KeyboardInterrupt) and _claim_first("KeyboardInterrupt") is None:
        atexit.register(_say_farewell)
    rank_zero_info(how_to_go_on(trainer))


def how_to_go_on(trainer: Trainer) -> str:
    """Where the last checkpoint is, and the call that resumes from it."""
    path = last_checkpoint(trainer)
    if path is None:
        return "Stopped. No checkpoint was written; start again with the same command."
    return (
        f"Stopped at step {trainer.global_step}. The last checkpoint is {path}\n"
        f"Go on with: trainer.fit(model, ckpt_path={path!r})"
    )


def last_checkpoint(trainer: Trainer) -> str | None:
    """Path of the furthest checkpoint that this run wrote, resumed from, or whose callbacks know of."""
    paths = [str(path) for path in (getattr(trainer.strategy, "last_saved", None), trainer.ckpt_path) if path]
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            paths += [callback.last_model_path, *callback.best_k_models, callback.best_model_path]
    present = [path for path in dict.fromkeys(paths) if path and is_checkpoint(path)]
    return max(present, key=lambda path: int(read_trainer_state(path)["global_step"]), default=None)


def _excepthook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    cause = f"{kind.__name__}: {value}"
    if _State.store is None:
        _before_ranks_meet(kind, value, trace, cause)
        return
    first = _claim_first(cause)
    if first is None:
        sys.stderr.write(f"rank {_State.rank} failed first:\n")
        _State.previous_hook(kind, value, trace)
        atexit.register(_say_farewell)  # not now: torch's own hook holds the text back until this one returns
        return
    _end(first)


def _before_ranks_meet(
    kind: type[BaseException], value: BaseException, trace: TracebackType | None, cause: str
) -> None:
    # No store yet, so nobody knows who was first; our own checks fail alike on every rank.
    if _State.rank != 0 and issubclass(kind, NeuronLightningError):
        sys.stderr.write(f"rank {_State.rank} stopped: {_one_line(cause)}\n")
    else:
        _State.previous_hook(kind, value, trace)


def _claim_first(cause: str) -> str | None:
    """None if this rank is the first to fail (it is then on record), else who was and why."""
    if _State.store is None:
        return None
    mine = f"rank {_State.rank} failed first: {_one_line(cause)}"
    try:
        _State.store.set_timeout(timedelta(seconds=_FAREWELL_S))
        recorded = _State.store.compare_set(_FIRST, "", mine).decode()
    except (RuntimeError, OSError):  # the store lived in rank 0's process, or in an agent that is gone
        return _STORE_GONE if _State.rank != 0 else None
    return None if recorded == mine else recorded


def _end(first: str) -> None:
    """Ends this process with one line; interpreter shutdown could wait for collectives that never finish."""
    sys.stderr.write(f"rank {_State.rank} stopped: {first}\n")
    if _State.rank == 0 and _State.advice is not None:
        sys.stderr.write(f"{_State.advice()}\n")
    try:
        _State.store.add(_SEEN, 1)
    except (RuntimeError, OSError):
        _log.debug("the store is gone")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if _State.rank == 0:  # the store may live here, and the first to fail still reads it
        time.sleep(_POLL_S)
    os._exit(1)


def _say_farewell() -> None:
    """Keeps the process, and a store it may hold, alive until the others have read who failed first."""
    deadline = time.monotonic() + _FAREWELL_S
    threading.Thread(target=_leave_at, args=(deadline + _FAREWELL_S,), daemon=True).start()
    others = dist.get_world_size() - 1 if dist.is_initialized() else 0
    try:
        while time.monotonic() < deadline and _State.store.add(_SEEN, 0) < others:
            time.sleep(_POLL_S / 5)
    except (RuntimeError, OSError):
        _log.debug("the store is gone")


def _leave_at(deadline: float) -> None:
    time.sleep(max(0.0, deadline - time.monotonic()))
    os._exit(1)


def _one_line(text: str) -> str:
    return " ".join(text.split())


class _Watcher(threading.Thread):
    """Looks into the store every half second; ends the process when another rank has failed."""

    def __init__(self, store: Any) -> None:
        super().__init__(name="neuron-lightning-failure-watcher", daemon=True)
        self._store = store
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends the thread and waits for it."""
        self._stopped.set()
        if threading.current_thread() is not self:
            self.join(_OWN_GRACE_S)

    def run(self) -> None:
        """Body of the thread."""
        first, grace = "", _OWN_GRACE_S
        while not first and not self._stopped.wait(_POLL_S):
            try:
                if self._store.check([_FIRST]):
                    first = self._store.get(_FIRST).decode()
            except (RuntimeError, OSError):
                # With the store its host is gone: rank 0, or the launcher's agent. At the end of a run that is
                # no failure: this rank then stops looking on its own.
                first, grace = _STORE_GONE, _LOST_STORE_S
        own = first.startswith(f"rank {_State.rank} ")
        if first and not own and not self._stopped.wait(grace):
            _end(first)
