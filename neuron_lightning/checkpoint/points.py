"""Named points of a save or a removal, where a test can step in: count, kill, fill a disk, fail.

In the order in which they are reached:

``snapshot_taken``: an asynchronous save has its copy, training goes on (every rank).
``prepared``: the place for the new files is there and empty (rank 0).
``share_opened``: a file of tensors of this rank is open and still empty (every rank, for each such file).
``share_written``: all bytes of this rank are written (every rank).
``share_synced``: and durable (every rank).
``gathered``: every rank knows that all shares are durable (every rank).
``manifest_written``: the manifest is durable, the checkpoint not committed yet (rank 0; not on object stores).
``before_rename``, ``after_rename``: around the commit, which on object stores is the manifest's own put (rank 0).
``renamed_aside``: the checkpoint of the same name has lost its name and the new one has none yet, on file systems that
cannot exchange two names (rank 0).
``parent_synced``: the new name is durable (rank 0).
``old_removed``: what the checkpoint of the same name left is gone (rank 0).
``remove_renamed``: a checkpoint that is being deleted has lost its name, or its manifest (the rank that deletes).

Nothing here is driven by the environment: without a registered callback :func:`reach` does nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from neuron_lightning.errors import CheckpointError

NAMES = (
    "snapshot_taken",
    "prepared",
    "share_opened",
    "share_written",
    "share_synced",
    "gathered",
    "manifest_written",
    "before_rename",
    "renamed_aside",
    "after_rename",
    "parent_synced",
    "old_removed",
    "remove_renamed",
)

_callbacks: dict[str, Callable[[], None]] = {}


def on(name: str, callback: Callable[[], None]) -> None:
    """Has ``callback`` called whenever this process reaches the point, in the thread that does. One for each point.

    Raises:
        CheckpointError: no such point.
    """
    if name not in NAMES:
        raise CheckpointError(f"there is no point {name!r} in a save; the points are {', '.join(NAMES)}.")
    _callbacks[name] = callback


def clear() -> None:
    """Forgets all callbacks."""
    _callbacks.clear()


def reach(name: str) -> None:
    """Tells who asked for it that ``name`` is reached; what the callback raises is raised here."""
    if (callback := _callbacks.get(name)) is not None:
        callback()
