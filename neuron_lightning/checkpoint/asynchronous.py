"""Saving beside training: a snapshot on the calling thread, everything else in the background.

The snapshot holds exactly the bytes that this rank will write, in the order in which they will stand in its files,
in host memory that is kept from one save to the next (pinned where there is an accelerator). So a save blocks
training for about as long as a copy of those bytes takes. The background thread talks to its peers over a process
group of its own: messages of two threads on one group would get mixed up.
"""

from __future__ import annotations

import atexit
import dataclasses
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from neuron_lightning.backends import get_backend
from neuron_lightning.backends.host_group import GLOO_SETTLES_S, destroy_host_group, new_host_group
from neuron_lightning.checkpoint import folder, points, storage, writer
from neuron_lightning.checkpoint.exchange import FAILURES, Ranks, describe
from neuron_lightning.checkpoint.plan import FilePlan, Planner, Request, Share
from neuron_lightning.checkpoint.storage import Place
from neuron_lightning.checkpoint.tensor_file import host_bytes
from neuron_lightning.errors import CheckpointError


class AsyncSaver:
    """Saves checkpoints in the background, one at a time. Every rank makes one, and calls it, together.

    A save that is in flight when the interpreter ends is finished first. Call :meth:`close` before the default
    process group is destroyed.

    Args:
        memory_budget: bytes of host memory that this rank's snapshot may take; None for no limit. A larger one is
            not taken: that save is written through on the calling thread, and a warning says so once.
    """

    def __init__(self, *, memory_budget: int | None = None) -> None:
        if memory_budget is not None and memory_budget < 0:
            raise CheckpointError(f"memory_budget must be at least 0 bytes, or None, not {memory_budget}.")
        self._budget = memory_budget
        self._group = new_host_group()
        self._ranks = Ranks(self._group, failures=(Exception,))
        self._planner = Planner()
        self._snapshot = Snapshot()
        self._thread: Thread | None = None
        self._target: str | None = None
        self._error: CheckpointError | None = None
        self._warned = False
        self._closed = False
        self._last_message = 0.0
        atexit.register(self._settle)

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def save(
        self,
        path: str | Path,
        *,
        on_commit: Callable[[], None] | None = None,
        progress: folder.Progress | None = None,
        **what: Any,
    ) -> None:
        """Takes a snapshot and starts to write it. Collective.

        Waits for the save before, if it is still in flight. Tensors may change as soon as this returns; nothing
        that was passed is looked at later.

        Args:
            path: as in :func:`write_checkpoint`.
            on_commit: called on rank 0, in the background, right after the commit; every rank gives one, or none does.
            progress: as in :func:`write_checkpoint`; called in the background.
            what: what to save: the keywords of :func:`write_checkpoint`.

        Raises:
            CheckpointError: on all ranks: the save before failed, or this one cannot be planned. Errors of the
                writing are raised by :meth:`wait`.
        """
        if self._closed:
            raise CheckpointError(f"cannot save {path}: this saver is closed; make a new one on all ranks.")
        self.wait()
        request, place = folder.request_for(path, **what), storage.place(path)
        share = self._planner.plan(request, self._ranks, f"save the checkpoint {place.name}")
        report = progress or _silent
        if through := self._over_budget(share, place):
            data = writer.live_data(share)
        else:
            data = self._snapshot.take(share)
            share = dataclasses.replace(share, views=())
            points.reach("snapshot_taken")
        self._target = place.name

        def work() -> None:
            self._write(request, share, data, place, report, on_commit)

        if through:
            work()
            self._target = None
        else:
            self._thread = Thread(target=work, name="checkpoint-save")
            self._thread.start()

    @property
    def pending(self) -> str | None:
        """Path of the save that is in flight on this rank, or None."""
        return self._target if self._thread is not None and self._thread.is_alive() else None

    @property
    def failed(self) -> bool:
        """Whether a save has failed that :meth:`wait` has not reported yet. Not collective, and cheap."""
        return self._error is not None and self.pending is None

    def wait(self) -> None:
        """Blocks until the save in flight, if any, is committed.

        Raises:
            CheckpointError: it failed; the same error on all ranks, once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = self._target = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits as :meth:`wait` does, then gives everything back. Every rank calls it; again, it does nothing."""
        if self._closed:
            return
        try:
            self.wait()
        finally:
            self._closed = True
            self._snapshot.free()
            self._planner = Planner()
            destroy_host_group(self._group)
            self._group = None
            atexit.unregister(self._settle)

    def _write(
        self,
        request: Request,
        share: Share,
        data: writer.Data,
        place: Place,
        progress: folder.Progress,
        on_commit: Callable[[], None] | None,
    ) -> None:
        self._error = CheckpointError(f"could not save the checkpoint {place.name}: its thread died.")
        try:
            writer.write(request, share, data, place, self._ranks, progress, on_commit)
            self._error = None
        except CheckpointError as error:
            self._error = error
        except FAILURES as error:
            self._error = CheckpointError(
                f"could not save the checkpoint {place.name}: the ranks have lost each other ({describe(error)})."
            )
        self._last_message = time.monotonic()

    def _over_budget(self, share: Share, place: Place) -> bool:
        if self._budget is None or share.size <= self._budget:
            return False
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the snapshot of {place.name} takes {share.size:,} bytes on rank {self._ranks.rank}, memory_budget "
                f"is {self._budget:,}: it is written while training waits; raise the budget to save in the "
                "background.",
                stacklevel=3,
            )
        return True

    def _settle(self) -> None:
        """At the interpreter's end, after the save in flight: see ``GLOO_SETTLES_S``."""
        if self._group is not None:
            time.sleep(max(0.0, self._last_message + GLOO_SETTLES_S - time.monotonic()))


class Snapshot:
    """Host memory that is laid out like the files that will be written from it, and used again and again."""

    def __init__(self) -> None:
        self._files: tuple[FilePlan, ...] = ()
        self._buffers: dict[str, Tensor] = {}
        self._places: list[list[Tensor]] = []

    def take(self, share: Share) -> writer.Data:
        """Copies a share's tensors. Returns the data as it is now."""
        if share.files is not self._files:
            self._lay_out(share)
        for places, tensors in zip(self._places, share.views, strict=True):
            for place, tensor in zip(places, tensors, strict=True):
                place.copy_(tensor, non_blocking=True)
        get_backend().synchronize()
        return lambda file: [(host_bytes(self._buffers[file.name]), True)]

    def free(self) -> None:
        """Gives the memory back."""
        self._files, self._buffers, self._places = (), {}, []

    def _lay_out(self, share: Share) -> None:
        old, self._places = self._buffers, []
        self._buffers = {}
        for file in share.files:
            size = file.layout.size
            kept = old.pop(file.name, None)
            buffer = kept if kept is not None and kept.numel() == size else _host_memory(size)
            self._buffers[file.name] = buffer
            self._places.append(
                [buffer.narrow(0, e.offset, e.size).view(e.dtype).view(e.shape) for e in file.layout.entries]
            )
        self._files = share.files


def _host_memory(size: int) -> Tensor:
    """Bytes in host memory, pinned where there is an accelerator that knows how."""
    if get_backend().device_type != "cpu":
        try:
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        except (RuntimeError, NotImplementedError):  # the device has no pinned memory
            pass
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""
