"""What the ranks tell each other around a save or a load: small objects over a process group.

A failure on one rank must be the same error on all, or the others wait for ever: work that can fail runs inside
:meth:`Ranks.together`. What runs beside training needs a group of its own, because messages of two threads on one
group get mixed up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from neuron_lightning.checkpoint.refusals import with_remedy
from neuron_lightning.errors import CheckpointError, NeuronLightningError

T = TypeVar("T")

FAILURES: tuple[type[Exception], ...] = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    MemoryError,
    NeuronLightningError,
)
"""What work on files and tensors can fail with; anything else is a bug and ends the rank."""


class Ranks:
    """The processes that save or load together.

    Args:
        group: a process group that serves CPU tensors; None for the default one, or for this process alone where
            ``torch.distributed`` is not initialised.
        failures: what work on one rank can fail with, so that all ranks hear of it.

    Attributes:
        rank: number of this process among them.
        size: how many they are.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        failures: tuple[type[Exception], ...] = FAILURES,
    ) -> None:
        self._group = group
        self._failures = failures
        joined = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank(group) if joined else 0
        self.size: int = dist.get_world_size(group) if joined else 1

    @classmethod
    def alone(cls) -> Ranks:
        """This process by itself, whatever other ranks there are."""
        ranks = cls()
        ranks.rank, ranks.size = 0, 1
        return ranks

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, in rank order, on every rank. Collective."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]

    def together(self, what: str, work: Callable[[], T]) -> list[T]:
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
        except self._failures as error:
            cause, failure = error, str(error) if isinstance(error, CheckpointError) else describe(error)
        outcomes = self.gather((result, failure))
        failed = [rank for rank, (_, message) in enumerate(outcomes) if message is not None]
        if failed:
            first = failed[0]
            others = f" ({len(failed)} of {len(outcomes)} ranks failed)" if len(outcomes) > 1 else ""
            prefix = f"rank {first} could not {what}: " if len(outcomes) > 1 else f"could not {what}: "
            raise CheckpointError(f"{prefix}{outcomes[first][1]}{others}") from cause
        return [value for value, _ in outcomes]  # type: ignore[misc]


def world() -> tuple[int, int]:
    """(rank, number of ranks) of the default group; (0, 1) without torch.distributed."""
    ranks = Ranks()
    return ranks.rank, ranks.size


def gather(value: T) -> list[T]:
    """:meth:`Ranks.gather` over the default group. Collective."""
    return Ranks().gather(value)


def together(what: str, work: Callable[[], T]) -> list[T]:
    """:meth:`Ranks.together` over the default group. Collective."""
    return Ranks().together(what, work)


def describe(error: BaseException) -> str:
    """An error as one line, with a remedy where the operating system refused."""
    return with_remedy(f"{type(error).__name__}: {error}", error)
