"""Which checkpoints of a run are kept: plain bookkeeping, the same on every rank, stored in the checkpoints themselves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Saved:
    """One checkpoint of a run.

    Attributes:
        path: its folder.
        step: optimizer steps made.
        score: the monitored value, or None where nothing was monitored.
    """

    path: str
    step: int
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """The checkpoints that a run keeps.

    Attributes:
        best: the ranked ones, best first; without a score the newest is the best.
        newest: the last one saved, where it is kept whatever its rank.
        obsolete: paths that the last save made superfluous.
    """

    best: tuple[Saved, ...] = ()
    newest: Saved | None = None
    obsolete: tuple[str, ...] = ()

    @property
    def kept(self) -> tuple[Saved, ...]:
        """All that are kept, each once."""
        extra = (self.newest,) if self.newest is not None and self.newest not in self.best else ()
        return (*self.best, *extra)

    def admits(self, score: float | None, *, limit: int, mode: str) -> bool:
        """Whether a checkpoint of this score would be among the ``limit`` best (-1: no limit)."""
        if limit < 0 or len(self.best) < limit:
            return True
        if limit == 0:
            return False
        return score is None or _better(score, self.best[-1].score, mode)

    def with_saved(self, saved: Saved, *, limit: int, mode: str, ranked: bool, keep_newest: bool) -> Shelf:
        """The shelf once ``saved`` is on it.

        Args:
            saved: the new one.
            limit: how many of the best are kept; -1 for all.
            mode: ``min`` or ``max``.
            ranked: whether it takes part in the ranking (``admits`` was asked before).
            keep_newest: whether it is kept whatever its rank.
        """
        others = tuple(one for one in self.best if one.path != saved.path)
        best = others
        if ranked:
            best = tuple(sorted((saved, *others), key=lambda one: _rank(one, mode)))
            best = best if limit < 0 else best[:limit]
        after = replace(self, best=best, newest=saved if keep_newest or not ranked else None)
        names = {one.path for one in after.kept}
        return replace(after, obsolete=tuple(one.path for one in self.kept if one.path not in names))

    def only(self, present: Collection[str]) -> Shelf:
        """The shelf without checkpoints that are not there any more."""
        newest = self.newest if self.newest is not None and self.newest.path in present else None
        return replace(self, best=tuple(one for one in self.best if one.path in present), newest=newest)

    def moved(self, old: str, new: str) -> Shelf:
        """The shelf of a run whose folder was moved; what lay elsewhere is left out."""

        def there(path: str) -> str | None:
            inside = path.startswith(old.rstrip("/") + "/")
            return new.rstrip("/") + path[len(old.rstrip("/")) :] if inside else None

        def moved(one: Saved) -> list[Saved]:
            path = there(one.path)
            return [] if path is None else [replace(one, path=path)]

        return Shelf(
            best=tuple(found for one in self.best for found in moved(one)),
            newest=next(iter(moved(self.newest)), None) if self.newest is not None else None,
            obsolete=tuple(path for old_path in self.obsolete if (path := there(old_path)) is not None),
        )

    def state(self) -> dict[str, Any]:
        """Plain values that :meth:`from_state` reads."""
        return {
            "best": [vars(one) for one in self.best],
            "newest": None if self.newest is None else vars(self.newest),
            "obsolete": list(self.obsolete),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Shelf:
        """What :meth:`state` described."""
        newest = state["newest"]
        return cls(
            best=tuple(Saved(**one) for one in state["best"]),
            newest=None if newest is None else Saved(**newest),
            obsolete=tuple(state["obsolete"]),
        )


def _better(score: float, than: float | None, mode: str) -> bool:
    if than is None:
        return True
    return score < than if mode == "min" else score > than


def _rank(one: Saved, mode: str) -> tuple[float, int]:
    """Ascending from the best: without scores the newest comes first, of equal scores the oldest."""
    if one.score is None:
        return (0.0, -one.step)
    return (one.score if mode == "min" else -one.score, one.step)
