"""The run that nobody disturbs: what a job ends with, batch by batch and step by step."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint import commit
from tests.faults.crew import Crew, read_trace
from tests.faults.training import Job, train

WORLD = 2
END_S = 30.0
"""How long the survivors of a killed rank may take to end."""
RUN_S = 90.0
"""How long a whole run may take, on a loaded machine; it takes one to three seconds."""


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
        folder: of the run, with its checkpoints.
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
    """Runs ``job`` once in this process' lifetime, and once with a checkpoint of every step, for their hashes."""
    folder = Path(tempfile.mkdtemp(prefix="faults-reference-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    run_to_end(job, folder / "job", 0, None)
    every = job.changed(keep=-1, interval=1, asynchronous=False)
    run_to_end(every, folder / "every", 0, None)
    return Reference(
        folder=folder / "job",
        traces=[read_trace(folder / "job" / f"trace-0-{rank}") for rank in range(WORLD)],
        numbers=[numbers_of(folder / "job", 1, rank) for rank in range(WORLD)],
        results=results_of(folder / "job", 0),
        hashes={step: file_hashes(path) for step, path in committed(folder / "every").items()},
    )


def numbers_of(folder: Path, attempts: int, rank: int) -> dict[str, Any]:
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


def results_of(folder: Path, attempt: int) -> list[str]:
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
    return {int(info.step or 0): Path(info.path) for info in checkpoint.list_checkpoints(place)}


def file_hashes(path: Path) -> dict[str, str]:
    """Hashes that the manifest has of everything that must be the same in any run of the job."""
    files = json.loads((commit.locate(path) / commit.MANIFEST).read_text())["files"]
    return {name: record["hash"] for name, record in files.items() if record["kind"] != "trainer"}
