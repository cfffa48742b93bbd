"""Kill a training job, look at what is left, let it go on, and compare it with a run that nobody disturbed."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuron_lightning import checkpoint
from neuron_lightning.errors import CheckpointError
from tests.faults.crew import read_trace
from tests.faults.harness import Outcome
from tests.faults.reference import (
    END_S,
    RUN_S,
    WORLD,
    Hang,
    Lost,
    Mixed,
    Reference,
    Wrong,
    committed,
    file_hashes,
    numbers_of,
    reference,
    results_of,
    run_to_end,
)
from tests.faults.strikes import Strike, Struck, Suicide, aim, run_and_strike, strike_at, strike_now
from tests.faults.training import Job

__all__ = [
    "END_S",
    "RUN_S",
    "WORLD",
    "Hang",
    "Lost",
    "Mixed",
    "Reference",
    "Strike",
    "Struck",
    "Suicide",
    "Wrong",
    "aim",
    "begin_at",
    "check_intact",
    "check_nothing_lost",
    "check_same",
    "check_tidy",
    "committed",
    "draw_job",
    "drill",
    "file_hashes",
    "numbers_of",
    "outputs",
    "phase",
    "reference",
    "results_of",
    "run_and_strike",
    "run_to_end",
    "strike_at",
    "strike_now",
    "verdict_of",
]


def check_intact(ref: Reference, found: dict[int, Path]) -> None:
    """Every committed checkpoint verifies, and holds what the undisturbed run had at that step."""
    for step, path in found.items():
        try:
            checkpoint.verify_checkpoint(path)
        except CheckpointError as error:
            raise Lost(f"step {step} is committed and damaged: {error}") from error
        if file_hashes(path) != ref.hashes.get(step):
            raise Mixed(f"{path} is not what the undisturbed run saved at step {step}")


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
        numbers = numbers_of(folder, attempts, rank)
        different = [key for key, number in ref.numbers[rank].items() if numbers.get(key) != number]
        if different or len(numbers) != len(ref.numbers[rank]):
            raise Wrong(
                f"rank {rank}: batches {different or sorted(set(numbers) - set(ref.numbers[rank]))} differ"
            )
    if results_of(folder, attempts - 1) != ref.results:
        raise Wrong("the final parameters or optimizer states differ from the undisturbed run's")


def begin_at(ref: Reference, folder: Path, step: int) -> Path:
    """Puts the undisturbed run's checkpoints up to ``step`` into ``folder``, as if attempt 0 had ended there."""
    (folder / "ckpt").mkdir(parents=True)
    for path in ref.folder.glob("numbers-0-*"):
        shutil.copy(path, folder)
    sources = {number: path for number, path in committed(ref.folder).items() if number <= step}
    for path in sources.values():
        shutil.copytree(path, folder / "ckpt" / path.name)
    return folder / "ckpt" / sources[step].name


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
        struck = _strike_in_time(job, folder, begun, strike, patient)
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


def _strike_in_time(
    job: Job, folder: Path, begun: Path | None, strike: Strike | Suicide, patient: bool
) -> Struck:
    """Strikes; a run that was faster than the undisturbed one, and had ended, is struck again a little earlier."""
    attempt, resume = (1, str(begun)) if begun else (0, None)
    struck = run_and_strike(job, folder, attempt, resume, strike, patient)
    for _ in range(2):
        if struck.landed or begun or isinstance(strike, Suicide):
            break
        shutil.rmtree(folder)
        strike = replace(strike, after_s=strike.after_s / 4)
        struck = run_and_strike(job, folder, attempt, resume, strike, patient)
    if not struck.landed:
        raise Wrong(f"the kill came too late\n{struck.output}")
    return struck


def check_tidy(job: Job, folder: Path, resumed: set[int]) -> None:
    """Nothing but the checkpoints that the job keeps is left; what a user named to resume from is never deleted.

    Lightning's own callback forgets, in what it saves, the checkpoint that it is about to remove: one that it had no
    time to remove stays, whole. Ours remembers, and removes it in the run that follows.
    """
    names = {path.name for path in (folder / "ckpt").iterdir()}
    steps = range(job.interval, job.steps + 1, job.interval)
    kept = ["newest.ckpt"] if job.keep == 0 else [f"step={n}.ckpt" for n in steps]
    expected = set(kept if job.keep <= 0 else kept[-job.keep :])
    allowed = set() if job.auto_resume else {f"step={step}.ckpt" for step in resumed}
    if not job.ours:
        allowed |= {path.name for step, path in committed(folder).items() if step < max(resumed, default=0)}
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
    choices: list[dict[str, Any]] = [
        {},
        {"tp": 2, "ours": True, "auto_resume": True},
        {"precision": "bf16-true", "ours": True, "asynchronous": True},
        {"accumulate": 2, "keep": 0},
        {
            "tp": 2,
            "precision": "bf16-true",
            "keep": 2,
            "ours": True,
            "asynchronous": True,
            "auto_resume": True,
        },
    ]
    return Job(**{**draw.choice(choices), **fixed})
