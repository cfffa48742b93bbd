"""Leftovers under the same name are cleared up; a second job on the same folder is refused, unless the first is dead."""

from __future__ import annotations

import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint import AsyncSaver
from neuron_lightning.parallel import parallel_state
from tests.faults import drill
from tests.faults.blocks import Block, check_steps
from tests.faults.crew import Crew, Trace, read_trace
from tests.faults.harness import Outcome, Pools, rng
from tests.faults.training import Job, train

NUMBER, TITLE = 12, "leftovers of the same step; second job"
_LEFTOVERS, _JOBS = 50, 20
FULL, SHARE = _LEFTOVERS + _JOBS, 7
WORLD = 2
_KINDS = ("part of a save", "whole save without its name", "junk", "link", "file", "removal", "replacement")


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """Several leftovers at once; two of seven are a second job, one in four of them after the first was killed."""
    found: list[dict[str, Any]] = []
    for index in range(count):
        draw = rng(NUMBER, index, seed)
        if index % 7 in (2, 5):
            kind = "after a killed job" if draw.random() < 0.25 else "second job"
            found.append({"kinds": [kind], "tp": draw.choice([1, 2]), "ours": draw.random() < 0.5})
            continue
        kinds = [_KINDS[index % len(_KINDS)], *draw.sample(["removal", "replacement"], draw.randrange(3))]
        case = {"kinds": list(dict.fromkeys(kinds)), "there": draw.random() < 0.5, "draw": draw.random()}
        found.append({**case, "asynchronous": draw.random() < 0.5})
    return found


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """Leaves things there, then saves step 2 on all ranks; or starts two jobs."""
    if "tp" in case:
        return _two_jobs(case, scratch)
    root, outside = scratch / "root", scratch / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "precious").write_text("x")
    pool = pools.get(WORLD)
    pool.run(save_on, str(root / "step=2"), 1, False, timeout=drill.RUN_S)
    for kind in case["kinds"]:
        _leave(kind, root / "step=2", outside, random.Random(case["draw"]))
    if not case["there"]:
        shutil.rmtree(root / "step=2")
    pool.run(save_on, str(root / "step=2"), 2, case["asynchronous"], timeout=drill.RUN_S)
    try:
        steps = check_steps(root)
    except AssertionError as error:
        return Outcome(drill.verdict_of(error), str(error))
    if steps != [2]:
        return Outcome("lost", f"step 2 was saved over {case['kinds']}, {steps} are there")
    if sorted(path.name for path in root.iterdir()) != ["step=2"]:
        return Outcome("wrong", f"left in the folder: {sorted(path.name for path in root.iterdir())}")
    if (outside / "precious").read_text() != "x":
        return Outcome("lost", "a file outside was deleted through a link")
    return Outcome("ok", f"{case['kinds'][0]}: cleared")


@dataclass(eq=False)
class Gate(Callback):
    """Training waits in its fifth batch until a file is there."""

    file: str

    def __call__(self, job: Job, trace: Trace, folder: Path) -> list[Callback]:
        """See :func:`tests.faults.training.train`."""
        return [self]

    def on_train_batch_start(self, *args: Any) -> None:
        """Waits, not for ever."""
        deadline = time.monotonic() + drill.RUN_S
        while args[3] == 4 and not Path(self.file).exists() and time.monotonic() < deadline:
            time.sleep(0.01)


def _two_jobs(case: dict[str, Any], folder: Path) -> Outcome:
    """The first job waits in the middle while the second one starts; or is killed there."""
    job = Job(tp=case["tp"], ours=case["ours"])
    ref, gate = drill.reference(job), folder / "gate"
    arguments = (job, str(folder), 0, None, Gate(str(gate)))
    try:
        with Crew(WORLD, train, *arguments, folder=folder / "out-0") as first:
            trace = folder / "trace-0-0"
            first.wait_until(lambda: any(e == "batch 0 4" for _, e in read_trace(trace)), drill.RUN_S)
            if case["kinds"] == ["second job"]:
                _refused(job, folder)
                gate.touch()
                if not first.wait(drill.RUN_S) or first.codes != [0, 0]:
                    raise drill.Wrong(f"the first job ended with {first.codes}\n{first.output()}")
                drill.check_same(ref, folder, 1)
        if case["kinds"] != ["second job"]:  # it was killed when the block ended
            drill.run_to_end(job, folder, 1, str(drill.committed(folder)[job.interval]))
            drill.check_same(ref, folder, 2)
        drill.check_intact(ref, drill.committed(folder))
        drill.check_tidy(job, folder, set())
    except AssertionError as error:
        return Outcome(drill.verdict_of(error), f"{error}\n{drill.outputs(folder)}")
    return Outcome("ok", f"{case['kinds'][0]}: {'refused' if gate.exists() else 'went on'}")


def _refused(job: Job, folder: Path) -> None:
    """A second job on the folder of one that runs."""
    with Crew(WORLD, train, job, str(folder), 9, None, folder=folder / "out-9") as second:
        if not second.wait(drill.RUN_S):
            raise drill.Hang(f"the second job did not end\n{second.output()}")
        if 0 in second.codes or "is in use by another job" not in second.output():
            raise drill.Wrong(f"the second job ended with {second.codes}\n{second.output()}")
    if any(event == "save" for _, event in read_trace(folder / "trace-9-0")):
        raise drill.Wrong("the second job saved")


def save_on(path: str, step: int, asynchronous: bool) -> None:
    """On every rank."""
    parallel_state.initialize_model_parallel(1)
    try:
        if not asynchronous:
            checkpoint.write_checkpoint(path, **Block(step).what(step))
            return
        with AsyncSaver() as saver:
            saver.save(path, **Block(step).what(step))
            saver.wait()
    finally:
        parallel_state.destroy_model_parallel()


def _leave(kind: str, target: Path, outside: Path, draw: random.Random) -> None:
    """Puts what a crash may leave beside ``target``, which is a whole checkpoint."""
    partial = target.with_name(f"{target.name}.tmp")
    if kind == "removal":
        grave = Path(shutil.copytree(target, target.with_name(f"{target.name}.removed")))
        next(grave.glob("*.safetensors")).unlink()
    elif kind == "replacement":
        shutil.copytree(target, target.with_name(f"{target.name}.old"))
    elif kind == "file":
        partial.write_text("not a folder")
    elif kind == "link":
        partial.symlink_to(outside)
    elif kind == "junk":
        (partial / "sub" / "folder").mkdir(parents=True)
        (partial / "sub" / "folder" / "file").write_bytes(bytes(1000))
        (partial / "link").symlink_to(outside)
    else:
        shutil.copytree(target, partial)
        if kind == "part of a save":
            (partial / "manifest.json").unlink()
            for path in sorted(partial.iterdir()):
                os.truncate(path, draw.randrange(path.stat().st_size))
                path.chmod(0o400)
            partial.chmod(0o500)
