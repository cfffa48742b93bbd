"""SIGKILL a single writer, uniformly in time, its temporary folder on the same file system as its checkpoints or not."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neuron_lightning import checkpoint
from tests.faults import disks, drill
from tests.faults.blocks import Block, check_steps
from tests.faults.crew import Crew, Trace, read_trace
from tests.faults.harness import Outcome, Pools, rng

NUMBER, TITLE = 3, "SIGKILL a single writer, same and other disk"
FULL, SHARE = 1000, 12
SOURCES = (
    "neuron_lightning/checkpoint/*.py",
    "neuron_lightning/errors.py",
    "tests/faults/blocks.py",
    "tests/faults/crew.py",
    "tests/faults/disks.py",
)
_PLACES = ("disk", "disk, temporary folder in memory", "memory, temporary folder on disk")
_SAVES = 10


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """Half of them with everything on one disk, a quarter each with one of the two in memory."""
    found = []
    for index in range(count):
        draw = rng(NUMBER, index, seed)
        place = _PLACES[[0, 1, 0, 2][index % 4]]
        found.append({"place": place, "replace": draw.random() < 0.5, "share": draw.random()})
    return found


def save(root: Path, step: int, replace: bool) -> None:
    """To one name, or to one for each step."""
    checkpoint.write_checkpoint(root / ("newest" if replace else f"step={step}"), **Block(step).what(step))


def write_on(root: str, replace: bool, home: str, saves: int, trace_file: str) -> None:
    """Body of the writer: saves step after step, and keeps the last two names."""
    trace = Trace(Path(trace_file))
    sys.dont_write_bytecode = True
    os.chdir(home)
    tempfile.tempdir = None
    _watch_writes(Path(root), trace)
    trace.mark("start")
    for step in range(1, saves + 1):
        save(Path(root), step, replace)
        trace.mark(f"saved {step}")
        if not replace and step > 2:
            checkpoint.remove_checkpoint(Path(root) / f"step={step - 2}")
            trace.mark(f"removed {step - 2}")


def _watch_writes(root: Path, trace: Trace) -> None:
    """Marks whatever Python code creates, renames or deletes outside of ``root``."""
    changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    names = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, (str, bytes)) or not isinstance(flags, int) or not flags & changing:
                return
        elif event in names:
            path = arguments[0]
        else:
            return
        place = Path(os.path.abspath(os.fsdecode(path))) if not isinstance(path, int) else root
        if root not in (place, *place.parents) and place != Path("/dev/null"):
            # rmtree names files relative to the folder that it is in: those that it opened are checked
            relative = not os.path.isabs(os.fsdecode(path)) and event in ("os.remove", "os.rmdir", "open")
            if not relative or place.exists():
                trace.mark(f"outside {event} {str(place)[-24:]}")

    sys.addaudithook(hook)


@contextmanager
def _places(case: dict[str, Any], scratch: Path) -> Iterator[tuple[Path, Path]]:
    """(root of the checkpoints, the folder that is home, working and temporary folder)."""
    (scratch / "disk").mkdir(parents=True, exist_ok=True)
    with disks.other_filesystem(scratch) as memory:
        places = {
            _PLACES[0]: (scratch / "disk", scratch),
            _PLACES[1]: (scratch / "disk", memory),
            _PLACES[2]: (memory, scratch / "disk"),
        }
        first, second = places[case["place"]]
        root, home = first / "root", second / "home"
        root.mkdir()
        home.mkdir()
        yield root, home


def _crew(root: Path, home: Path, replace: bool, saves: int, folder: Path) -> Crew:
    env = {"TMPDIR": str(home), "HOME": str(home)}
    trace = str(folder / "trace")
    return Crew(1, write_on, str(root), replace, str(home), saves, trace, folder=folder / "out", env=env)


@functools.cache
def _undisturbed(place: str, replace: bool) -> list[tuple[float, str]]:
    folder = Path(tempfile.mkdtemp(prefix="faults-writer-"))
    try:
        with _places({"place": place}, folder) as (root, home):
            with _crew(root, home, replace, _SAVES, folder) as crew:
                if not crew.wait(drill.RUN_S) or crew.codes != [0]:
                    raise drill.Wrong(f"the undisturbed writer failed\n{crew.output()}")
            return read_trace(folder / "trace")
    finally:
        shutil.rmtree(folder)


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """Kill it, look, save again with a new process' eyes, look again."""
    trace = _undisturbed(case["place"], case["replace"])
    strike = drill.strike_at(trace, 0, trace[0][0] + case["share"] * (trace[-1][0] - trace[0][0]))
    with _places(case, scratch) as (root, home):
        with _crew(root, home, case["replace"], 1000, scratch) as crew:
            drill.strike_now(crew, scratch / "trace", strike)
            crew.wait(drill.END_S)
            if crew.codes != [-9]:
                return Outcome("wrong", f"the writer ended with {crew.codes}\n{crew.output()}")
        try:
            newest = _look(root, read_trace(scratch / "trace"), case["replace"])
            left = sorted(path.name for path in root.iterdir())
            save(root, newest + 1, case["replace"])
            if check_steps(root)[-1] != newest + 1:
                raise drill.Lost(f"step {newest + 1} was saved, {check_steps(root)} are there")
            _tidy(root, home, newest + 1, case["replace"])
        except AssertionError as error:
            return Outcome(drill.verdict_of(error), f"{error}\n{drill.outputs(scratch)}")
    unfinished = any(name.endswith((".tmp", ".old", ".removed")) for name in left)
    return Outcome("ok", f"{case['place']}{', mid-save' if unfinished else ''}: step {newest}")


def _look(root: Path, trace: list[tuple[float, str]], replace: bool) -> int:
    """What is there after the kill; the newest step."""
    outside = [event for _, event in trace if event.startswith("outside")]
    if outside:
        raise drill.Wrong(f"written outside of the root: {outside}")
    saved = max((int(event.split()[1]) for _, event in trace if event.startswith("saved")), default=0)
    steps = check_steps(root)
    newest = max(steps, default=0)
    if newest not in (saved, saved + 1):
        raise drill.Lost(f"step {saved} had been saved, {steps} are there")
    if not replace and saved > 1 and not {saved, saved - 1} <= {*steps, newest - 1}:
        raise drill.Lost(f"steps {saved - 1} and {saved} had been saved, {steps} are there")
    return newest


def _tidy(root: Path, home: Path, newest: int, replace: bool) -> None:
    names = {path.name for path in root.iterdir()}
    allowed = {"newest"} if replace else {f"step={step}" for step in range(max(1, newest - 3), newest + 1)}
    if not names <= allowed:
        raise drill.Wrong(f"left in the root: {sorted(names)}")
    if outside := list(home.rglob("*")):
        raise drill.Wrong(f"left outside of the root: {outside}")
