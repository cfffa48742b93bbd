"""Kill a training job, look at what is left, let it go on, and compare it with a run that nobody disturbed."""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint import commit, points
from neuron_lightning.errors import CheckpointError
from tests.faults.crew import Crew, Trace, count_trace, read_trace
from tests.faults.harness import Outcome
from tests.faults.training import Job, train

WORLD = 2
END_S = 30.0
"""How long the survivors of a killed rank may take to end."""
RUN_S = 90.0
"""How long a whole run may take, on a loaded machine; it takes one to three seconds."""
AGENT_S = 0.2
"""When torchrun's agent, which looks ten times a second, has told the survivors to stop."""


class Lost(AssertionError):
    """A committed checkpoint is gone."""


class Mixed(AssertionError):
    """A checkpoint holds what the undisturbed run did not have at its step."""


class Hang(AssertionError):
    """A process did not end."""


class Wrong(AssertionError):
    """Anything else."""


@dataclass(frozen=True)
class Reference:
    """A run that nobody disturbed.

    Attributes:
        folder: of the run, with all its checkpoints.
        traces: by rank, what was reached when.
        numbers: by rank, loss and gradient norm by batch.
        results: by rank, digest of the final parameters and optimizer state.
        hashes: by step, the hashes of the checkpoint's files of weights, optimizer and random state.
    """

    folder: Path
    traces: list[list[tuple[float, str]]]
    numbers: list[dict[str, Any]]
    results: list[str]
    hashes: dict[int, dict[str, str]]


@functools.cache
def reference(job: Job) -> Reference:
    """Runs ``job`` once in this process' lifetime, keeping all its checkpoints."""
    folder = Path(tempfile.mkdtemp(prefix="faults-reference-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    result: Reference | None = None
    for keep in dict.fromkeys((job.keep, -1)):  # the first one's times are those of the job
        place = folder / str(keep)
        run_to_end(job.changed(keep=keep), place, 0, None)
        traces = [read_trace(place / f"trace-0-{rank}") for rank in range(WORLD)]
        numbers = [_numbers(place, 1, rank) for rank in range(WORLD)]
        hashes = {step: file_hashes(path) for step, path in committed(place).items()}
        first = result or Reference(place, traces, numbers, _results(place, 0), hashes)
        result = Reference(place, first.traces, first.numbers, first.results, hashes)
    assert result is not None
    return result


def _numbers(folder: Path, attempts: int, rank: int) -> dict[str, Any]:
    """Loss and norm by batch over all attempts; two attempts that trained on a batch must agree."""
    found: dict[str, Any] = {}
    for attempt in range(attempts):
        path = folder / f"numbers-{attempt}-{rank}"
        for line in path.read_text().splitlines() if path.exists() else []:
            number = json.loads(line)
            key = number.pop("batch")
            if found.setdefault(key, number) != number:
                raise Wrong(
                    f"batch {key} on rank {rank}: attempt {attempt} has {number}, before {found[key]}"
                )
    return found


def _results(folder: Path, attempt: int) -> list[str]:
    return [(folder / f"result-{attempt}-{rank}").read_text() for rank in range(WORLD)]


def run_to_end(job: Job, folder: Path, attempt: int, resume: str | None) -> None:
    """One attempt that nobody disturbs."""
    folder.mkdir(parents=True, exist_ok=True)
    with Crew(WORLD, train, job, str(folder), attempt, resume, folder=folder / f"out-{attempt}") as crew:
        if not crew.wait(RUN_S):
            raise Hang(f"attempt {attempt} did not end within {RUN_S:g} s\n{crew.output()}")
        if crew.codes != [0] * WORLD:
            raise Wrong(f"attempt {attempt} ended with {crew.codes}\n{crew.output()}")


def committed(folder: Path) -> dict[int, Path]:
    """Path by step of the committed checkpoints of a job, as anybody sees them who looks for one to resume from."""
    place = folder / "ckpt"
    if not place.exists():
        return {}
    return {info.step: Path(info.path) for info in checkpoint.list_checkpoints(place)}


def file_hashes(path: Path) -> dict[str, str]:
    """Hashes that the manifest has of everything that must be the same in any run of the job."""
    files = json.loads((commit.locate(path) / commit.MANIFEST).read_text())["files"]
    return {name: record["hash"] for name, record in files.items() if record["kind"] != "trainer"}


def check_intact(ref: Reference, found: dict[int, Path]) -> None:
    """Every committed checkpoint verifies, and holds what the undisturbed run had at that step."""
    for step, path in found.items():
        try:
            checkpoint.verify_checkpoint(path)
        except CheckpointError as error:
            raise Lost(f"step {step} is committed and damaged: {error}") from error
        if file_hashes(path) != ref.hashes.get(step):
            raise Mixed(f"{path} is not what the undisturbed run saved at step {step}")


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
    begin, end = {"save": ("save", "save returns"), "remove": ("remove", "removed")}.get(where, ("", ""))
    if not begin:
        fitted = _times(trace, "fitted")[0]
        return strike_at(trace, rank, trace[0][0] + share * (fitted - trace[0][0]))
    spans = list(zip(_times(trace, begin), _times(trace, end), strict=True))
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
        patient: nobody tells the survivors to stop; else they get a SIGTERM, as torchrun's agent sends it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    more = strike if isinstance(strike, Suicide) else None
    arguments = (job, str(folder), attempt, resume, more)
    with Crew(WORLD, train, *arguments, folder=folder / f"out-{attempt}") as crew:
        if isinstance(strike, Strike):
            strike_now(crew, folder / f"trace-{attempt}-{strike.rank}", strike)
        landed = crew.wait_for(strike.rank, RUN_S) == -signal.SIGKILL
        moment = time.monotonic()
        if landed and not patient and not crew.wait(AGENT_S):
            crew.signal(signal.SIGTERM)
        if not crew.wait(END_S):
            raise Hang(f"ranks that outlived rank {strike.rank} did not end: {crew.codes}\n{crew.output()}")
        return Struck(landed, moment, crew.output())


def strike_now(crew: Crew, trace: Path, strike: Strike) -> None:
    """Waits for the strike's moment in the rank's trace, and kills the rank."""
    deadline = time.monotonic() + RUN_S
    while count_trace(trace) < strike.events and None in crew.codes and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(strike.after_s)
    crew.signal(signal.SIGKILL, strike.rank)


def phase(folder: Path, attempt: int, moment: float) -> str:
    """What the job was doing then: start-up, save, remove, train, or end."""
    events = [name for when, name in read_trace(folder / f"trace-{attempt}-0") if when <= moment]
    if events.count("save") > events.count("parent_synced") + events.count("save given up"):
        return "mid-save"
    if events.count("remove") > events.count("removed"):
        return "mid-removal"
    if not any(name.startswith("train from") for name in events):
        return "mid-restore" if "restore" in events else "start-up"
    return "after the last step" if "fitted" in events else "between"


def check_nothing_lost(job: Job, folder: Path, attempt: int, before: int) -> None:
    """Every save that was durable is there (but for retention), and at most an interval of work is lost.

    Args:
        before: step that the attempt started from.
    """
    events = [name for _, name in read_trace(folder / f"trace-{attempt}-0")]
    saved = [before + job.interval * n for n in range(1, events.count("parent_synced") + 1)]
    if before:
        saved.insert(0, before)
    expected = saved if job.keep < 0 else saved[-max(1, job.keep) :]
    found = committed(folder)
    gone = [step for step in expected if step not in found]
    if gone and not (job.keep == 0 and max(found, default=0) > max(gone)):
        raise Lost(f"durable at step {saved}, committed are {sorted(found)}: {gone} is lost")
    reached = max([before, *(int(name.split()[1]) for name in events if name.startswith("step "))])
    lost = reached - max(found, default=0)
    allowed = job.interval * (2 if job.asynchronous else 1)
    if lost > allowed:
        raise Lost(
            f"step {reached} was reached, {sorted(found)} are committed: {lost} steps lost, not {allowed}"
        )


def check_same(ref: Reference, folder: Path, attempts: int) -> None:
    """The last attempt ended as the undisturbed run did, and every batch on the way was the same to the bit."""
    for rank in range(WORLD):
        numbers = _numbers(folder, attempts, rank)
        different = [key for key, number in ref.numbers[rank].items() if numbers.get(key) != number]
        if different or len(numbers) != len(ref.numbers[rank]):
            raise Wrong(
                f"rank {rank}: batches {different or sorted(set(numbers) - set(ref.numbers[rank]))} differ"
            )
    if _results(folder, attempts - 1) != ref.results:
        raise Wrong("the final parameters or optimizer states differ from the undisturbed run's")


def begin_at(ref: Reference, folder: Path, step: int) -> Path:
    """Puts a checkpoint of the undisturbed run into ``folder``, as if attempt 0 had ended after it."""
    (folder / "ckpt").mkdir(parents=True)
    for path in ref.folder.glob("numbers-0-*"):
        shutil.copy(path, folder)
    source = committed(ref.folder)[step]
    return Path(shutil.copytree(source, folder / "ckpt" / source.name))


def drill(
    job: Job, folder: Path, strike: Strike | Suicide, *, patient: bool = False, begun: Path | None = None
) -> Outcome:
    """Kills once, looks, goes on from the newest checkpoint, and compares. The outcome says where the kill landed.

    Args:
        begun: what :func:`begin_at` returned, to go on from there.
    """
    ref = reference(job)
    attempt, before = (1, max(committed(folder))) if begun else (0, 0)
    try:
        struck = run_and_strike(job, folder, attempt, str(begun) if begun else None, strike, patient)
        if not struck.landed:
            return Outcome("wrong", f"the kill came too late\n{struck.output}")
        where = phase(folder, attempt, struck.moment)
        found = committed(folder)
        check_intact(ref, found)
        check_nothing_lost(job, folder, attempt, before)
        newest = max(found, default=0)
        run_to_end(job, folder, attempt + 1, str(found[newest]) if newest else None)
        check_same(ref, folder, attempt + 2)
        check_intact(ref, committed(folder))
        check_tidy(job, folder, {before, newest})
    except AssertionError as error:
        return Outcome(verdict_of(error), f"{error}\n{outputs(folder)}")
    return Outcome("ok", f"{where}: step {newest}")


def check_tidy(job: Job, folder: Path, resumed: set[int]) -> None:
    """Nothing but the checkpoints that the job keeps is left; Lightning never deletes the one it resumed from."""
    names = {path.name for path in (folder / "ckpt").iterdir()}
    steps = range(job.interval, job.steps + 1, job.interval)
    kept = ["newest.ckpt"] if job.keep == 0 else [f"step={n}.ckpt" for n in steps]
    expected = set(kept if job.keep <= 0 else kept[-job.keep :])
    allowed = {f"step={step}.ckpt" for step in resumed}
    if names - allowed != expected - allowed:
        raise Wrong(f"left in the folder are {sorted(names)}, expected {sorted(expected)}")


def verdict_of(error: AssertionError) -> Any:
    """The verdict that an error stands for."""
    kinds = {Lost: "lost", Mixed: "mixed", Hang: "hang"}
    return kinds.get(type(error), "wrong")


def outputs(folder: Path) -> str:
    """What all ranks of all attempts wrote, and what they reached last."""
    parts = []
    for log in sorted(folder.glob("out-*/rank-*.txt")):
        parts.append(f"--- {log.relative_to(folder)} ---\n{log.read_text(errors='replace')[-6000:]}")
    for trace in sorted(folder.glob("trace-*")):
        parts.append(f"--- {trace.name} --- {[name for _, name in read_trace(trace)][-12:]}")
    return "\n".join(parts)


def draw_job(draw: random.Random, **fixed: Any) -> Job:
    """One of the configurations that are killed; few, because each needs an undisturbed run."""
    choices = [
        {},
        {"tp": 2},
        {"precision": "bf16-true"},
        {"accumulate": 2, "keep": 0},
        {"tp": 2, "precision": "bf16-true", "keep": 2},
    ]
    return Job(**{**draw.choice(choices), **fixed})
