"""What a backend counts of its compiler and of what goes to the host."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts since the process began; subtract two of them for those of a step. All zero where nothing is counted.

    Attributes:
        compiled: graphs that were compiled.
        run: graphs that were started, compiled before or not.
        reads: scalars that the host asked for (``.item()``, ``bool(tensor)``).
        fallbacks: operators that ran on the host because XLA has none, without the reads.
        transfers: times that tensors were fetched, however many at a time.
    """

    compiled: int = 0
    run: int = 0
    reads: int = 0
    fallbacks: int = 0
    transfers: int = 0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(**{name: value - getattr(other, name) for name, value in vars(self).items()})
