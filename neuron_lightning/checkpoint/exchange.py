"""What the ranks tell each other around a save or a load: small objects over the default process group.

A failure on one rank must be the same error on all, or the others wait for ever: work that can fail runs inside
:func:`together`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from neuron_lightning.errors import CheckpointError, NeuronLightningError

T = TypeVar("T")

FAILURES = (OSError, RuntimeError, ValueError, TypeError, KeyError, MemoryError, NeuronLightningError)
"""What work on files and tensors can fail with; anything else is a bug and ends the rank."""


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(value: T) -> list[T]:
    """Every rank's ``value``, in rank order, on every rank. Collective."""
    size = world()[1]
    if size == 1:
        return [value]
    values: list[T | None] = [None] * size
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def together(what: str, work: Callable[[], T]) -> list[T]:
    """Runs ``work`` on every rank; the results of all in rank order, or the same error on all. Collective.

    Args:
        what: what is being done, for the message: ``"write the checkpoint /x"``.
        work: this rank's share; must not itself wait for other ranks.

    Raises:
        CheckpointError: some rank failed; names the lowest such rank and its cause.
    """
    result: T | None = None
    failure: str | None = None
    cause: BaseException | None = None
    try:
        result = work()
    except FAILURES as error:
        cause, failure = error, str(error) if isinstance(error, CheckpointError) else _describe(error)
    outcomes = gather((result, failure))
    failed = [rank for rank, (_, message) in enumerate(outcomes) if message is not None]
    if failed:
        first = failed[0]
        others = f" ({len(failed)} of {len(outcomes)} ranks failed)" if len(outcomes) > 1 else ""
        prefix = f"rank {first} could not {what}: " if len(outcomes) > 1 else f"could not {what}: "
        raise CheckpointError(f"{prefix}{outcomes[first][1]}{others}") from cause
    return [value for value, _ in outcomes]  # type: ignore[misc]


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
