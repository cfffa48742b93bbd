"""What any rank may wish at an optimizer step and all ranks then do: one small all-reduce on the host a step."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import torch
import torch.distributed as dist

from neuron_lightning.lightning.strategy_collectives import is_distributed


class Votes:
    """Yes-or-no questions that every rank answers; the answer is yes for all as soon as one rank says so.

    The answers lie in host memory and are read through numpy: asking costs the device nothing.
    """

    def __init__(self) -> None:
        self._questions: dict[str, Callable[[], bool]] = {}

    def ask(self, name: str, answer: Callable[[], bool]) -> None:
        """Adds a question (or replaces the one of that name). Every rank adds the same ones, in the same order."""
        self._questions[name] = answer

    def withdraw(self, name: str) -> None:
        """Removes a question, if it is there; on every rank alike."""
        self._questions.pop(name, None)

    def count(self) -> frozenset[str]:
        """The names of the questions that some rank answers with yes. All ranks together."""
        answers = numpy.array([bool(answer()) for answer in self._questions.values()], dtype=numpy.int64)
        if is_distributed() and dist.get_world_size() > 1:
            dist.all_reduce(torch.from_numpy(answers), op=dist.ReduceOp.MAX)
        return frozenset(name for name, yes in zip(self._questions, answers, strict=True) if yes)


class Flag:
    """A wish that is set once; setting it is safe inside a signal handler."""

    def __init__(self) -> None:
        self._here = False

    def set_here(self) -> None:
        """Notes the wish on this rank."""
        self._here = True

    def __call__(self) -> bool:
        return self._here
