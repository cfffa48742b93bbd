"""When and how a rank of a training job is killed."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Callback

from neuron_lightning.checkpoint import commit, points
from tests.faults.crew import Crew, Trace, count_trace
from tests.faults.reference import END_S, RUN_S, WORLD, Hang, Reference
from tests.faults.training import Job, train

AGENT_S = 0.2
"""When torchrun's agent, which looks ten times a second, has told the survivors to stop."""


@dataclass(frozen=True)
class Strike:
    """When a rank is killed: ``after_s`` seconds after its n-th event."""

    rank: int
    events: int
    after_s: float


def strike_at(trace: list[tuple[float, str]], rank: int, moment: float) -> Strike:
    """The strike that comes at ``moment`` of the clock of an undisturbed run's trace."""
    events = max(1, sum(when <= moment for when, _ in trace))
    return Strike(rank, events, max(0.0, moment - trace[events - 1][0]))


def aim(ref: Reference, rank: int, where: str, share: float, number: int = 0) -> Strike:
    """A strike at ``share`` (0 to 1) of the whole run (``where`` is ``any``), or of its n-th save or removal."""
    trace = ref.traces[rank]
    if where == "any":
        fitted = _times(trace, "fitted")[0]
        return strike_at(trace, rank, trace[0][0] + share * (fitted - trace[0][0]))
    if where == "remove":
        spans = list(zip(_times(ref.traces[0], "remove"), _times(ref.traces[0], "removed"), strict=True))
    else:  # a save in the background ends with its commit
        ends = zip(_times(trace, "save returns"), _times(ref.traces[0], "parent_synced"), strict=True)
        spans = list(zip(_times(trace, "save"), map(max, ends), strict=True))
    first, last = spans[number % len(spans)]
    return strike_at(trace, rank, first + share * (last - first))


def _times(trace: list[tuple[float, str]], event: str) -> list[float]:
    return [when for when, name in trace if name == event]


@dataclass(frozen=True)
class Suicide:
    """A rank kills itself at the n-th time that it reaches a named point of a save.

    Attributes:
        without_exchange: as on a file system that cannot exchange two names.
    """

    rank: int
    point: str
    number: int
    without_exchange: bool = False

    def __call__(self, job: Job, trace: Trace, folder: Path) -> list[Callback]:
        """Registers the point on that rank; see :func:`tests.faults.training.train`."""
        if self.without_exchange:
            commit._exchange = lambda a, b: False
        seen = iter(range(1, 1 << 30))

        def reached() -> None:
            trace.mark(self.point)
            if next(seen) == self.number:
                os.kill(os.getpid(), signal.SIGKILL)

        if int(os.environ["RANK"]) == self.rank:
            points.on(self.point, reached)
        return []


@dataclass(frozen=True)
class Struck:
    """What a strike hit.

    Attributes:
        landed: whether the rank was killed before it had ended.
        moment: the clock's time of it.
        output: of all ranks.
    """

    landed: bool
    moment: float
    output: str


def run_and_strike(
    job: Job,
    folder: Path,
    attempt: int,
    resume: str | None,
    strike: Strike | Suicide,
    patient: bool = False,
) -> Struck:
    """Starts an attempt and has one rank killed; the others must end.

    Args:
        patient: once all ranks train, nobody tells the survivors to stop; else they get a SIGTERM, as torchrun's agent
            sends it. (Ranks that are still finding each other wait as long as the process group's timeout says.)
    """
    folder.mkdir(parents=True, exist_ok=True)
    more = strike if isinstance(strike, Suicide) else None
    arguments = (job, str(folder), attempt, resume, more)
    with Crew(WORLD, train, *arguments, folder=folder / f"out-{attempt}") as crew:
        if isinstance(strike, Strike):
            strike_now(crew, folder / f"trace-{attempt}-{strike.rank}", strike)
        landed = crew.wait_for(strike.rank, RUN_S) == -signal.SIGKILL
        moment = time.monotonic()
        traces = [folder / f"trace-{attempt}-{rank}" for rank in range(WORLD)]
        deaf = patient and all(count_trace(trace) > 1 for trace in traces)
        if landed and not deaf and not crew.wait(AGENT_S):
            crew.signal(signal.SIGTERM)
        if not crew.wait(END_S):
            raise Hang(f"ranks that outlived rank {strike.rank} did not end: {crew.codes}\n{crew.output()}")
        return Struck(landed, moment, crew.output())


def strike_now(crew: Crew, trace: Path, strike: Strike) -> None:
    """Waits for the strike's moment in the rank's trace, and kills the rank."""
    crew.wait_until(lambda: count_trace(trace) >= strike.events, RUN_S)
    time.sleep(strike.after_s)
    crew.signal(signal.SIGKILL, strike.rank)
