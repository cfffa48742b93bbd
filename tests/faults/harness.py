"""Runs the rows of the fault matrix, case by case, into a results file that shards and later runs add to.

A row is a module ``tests/faults/row_XX_<name>.py``::

    NUMBER, TITLE = 3, "SIGKILL a single writer"
    FULL, SHARE = 1000, 12              # cases in the full run, and in `make test`
    TIMEOUT_S = 120                     # optional: seconds after which a case counts as a hang
    SOURCES = ("neuron_lightning/checkpoint/*.py",)  # optional: what its results depend on, besides the row itself

    def cases(count: int, seed: int) -> list[dict]: ...     # JSON-able; a smaller count is a prefix of a larger one
    def run(case: dict, scratch: Path, pools: Pools) -> Outcome: ...

``run`` may raise: :class:`neuron_lightning.testing.RankFailure` on a timeout counts as a hang, every other exception
as wrong. The scratch folder of a case that is not ok is kept.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import random
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, cast

import tests.faults
from neuron_lightning.testing import RankFailure, RankPool

ROOT = Path(__file__).resolve().parents[2]
Verdict = Literal["ok", "lost", "mixed", "silent", "hang", "wrong"]
VERDICTS: tuple[Verdict, ...] = ("ok", "lost", "mixed", "silent", "hang", "wrong")
DEFAULT_TIMEOUT_S = 400.0
SOURCES = (
    "neuron_lightning/*.py",
    *(f"neuron_lightning/{f}/**/*.py" for f in ("backends", "parallel", "checkpoint", "optim", "data", "lightning")),
)  # fmt: skip
"""What a result depends on unless the row says otherwise."""


@dataclass(frozen=True)
class Outcome:
    """How a case went.

    Attributes:
        verdict: ``ok``; ``lost``: a committed checkpoint is gone; ``mixed``: one holds parts of two steps;
            ``silent``: damage that nobody reported; ``hang``; ``wrong``: anything else that differs.
        detail: what happened. Of an ok case the text before the first colon is tallied in the table.
    """

    verdict: Verdict
    detail: str = ""


class Row(Protocol):
    """A module of a row."""

    NUMBER: int
    TITLE: str
    FULL: int
    SHARE: int

    def cases(self, count: int, seed: int) -> list[dict[str, Any]]: ...

    def run(self, case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome: ...


class Pools:
    """Warm ranks by world size, started when first asked for; a pool whose rank died restarts itself."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def get(self, world_size: int) -> RankPool:
        """The pool of ``world_size`` warm ranks with a process group."""
        return self._pools.setdefault(world_size, RankPool(world_size))

    def close(self) -> None:
        """Ends all ranks."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def __enter__(self) -> Pools:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the results file."""

    row: int
    index: int
    seed: int
    sources: str
    verdict: Verdict
    detail: str
    case: dict[str, Any]
    seconds: float


def rows() -> dict[int, Row]:
    """Every row there is, by number."""
    found: dict[int, Row] = {}
    for info in pkgutil.iter_modules(tests.faults.__path__):
        if info.name.startswith("row_"):
            row = cast(Row, importlib.import_module(f"tests.faults.{info.name}"))
            if row.NUMBER in found:
                raise ValueError(f"two modules are row {row.NUMBER}")
            found[row.NUMBER] = row
    return dict(sorted(found.items()))


def rng(row: int, index: int, seed: int) -> random.Random:
    """The random numbers of one case: a function of the three, so that a smaller count is a prefix."""
    return random.Random(f"{row}/{index}/{seed}")


def fingerprint(row: Row) -> str:
    """Digest of the sources that a row's results depend on."""
    patterns = (*getattr(row, "SOURCES", SOURCES), "tests/faults/harness.py")
    own = Path(cast(Any, row).__file__).relative_to(ROOT)
    digest = hashlib.sha256()
    for path in sorted({own, *(p.relative_to(ROOT) for pattern in patterns for p in ROOT.glob(pattern))}):
        digest.update(f"{path}\0".encode() + (ROOT / path).read_bytes())
    return digest.hexdigest()[:16]


def run_case(row: Row, index: int, seed: int, case: dict[str, Any], base: Path, pools: Pools) -> Record:
    """Runs one case in a scratch folder of its own under ``base``; removed if all is well.

    Raises:
        Unavailable: this machine cannot.
    """
    scratch = base / f"row-{row.NUMBER:02d}-case-{index}-seed-{seed}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    begun = time.monotonic()
    outcome = _outcome(row, case, scratch, pools)
    if outcome.verdict == "ok":
        shutil.rmtree(scratch, ignore_errors=True)
    return Record(
        row=row.NUMBER,
        index=index,
        seed=seed,
        sources=fingerprint(row),
        verdict=outcome.verdict,
        detail=outcome.detail,
        case=case,
        seconds=round(time.monotonic() - begun, 2),
    )


class Unavailable(Exception):
    """This machine cannot play the case; the message says why. It gets no result."""


class CaseTimeout(Exception):
    """A case took longer than its row allows."""


def _outcome(row: Row, case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    limit = float(getattr(row, "TIMEOUT_S", DEFAULT_TIMEOUT_S))
    try:
        with _limited(limit):
            return row.run(case, scratch, pools)
    except CaseTimeout:
        pools.close()
        return Outcome("hang", f"the case had not ended after {limit:g} s\n{traceback.format_exc()}")
    except RankFailure as error:
        verdict: Verdict = "hang" if error.first_rank is None else "wrong"
        return Outcome(verdict, f"{error}\n{traceback.format_exc()}")
    except Unavailable:
        raise
    except Exception:  # noqa: BLE001 - whatever a case raises is its result
        return Outcome("wrong", traceback.format_exc())


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises :class:`CaseTimeout` in the main thread after ``seconds``; an alarm that is set (pytest's) stays so."""

    def expired(signum: int, frame: Any) -> None:
        raise CaseTimeout

    theirs = signal.getitimer(signal.ITIMER_REAL)[0]
    if threading.current_thread() is not threading.main_thread() or 0 < theirs < seconds:
        yield
        return
    begun = time.monotonic()
    previous = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        left = max(0.01, theirs - (time.monotonic() - begun)) if theirs else 0.0
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, left)


def read_results(
    paths: Iterable[Path], every: Iterable[Row]
) -> tuple[dict[tuple[int, int, int], Record], int]:
    """Records of the present sources by (row, index, seed), and how many lines are of others or cut off.

    Of a case that ran twice the last record counts, but one that was not ok stays.
    """
    present = {row.NUMBER: fingerprint(row) for row in every}
    known: dict[tuple[int, int, int], Record] = {}
    stale = 0
    for line in (line for path in paths if path.exists() for line in path.read_text("utf-8").splitlines()):
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError):
            stale += 1
            continue
        key = (record.row, record.index, record.seed)
        if present.get(record.row) != record.sources:
            stale += record.row in present
        elif key not in known or known[key].verdict == "ok":
            known[key] = record
    return known, stale


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run of the harness is asked for."""

    chosen: Sequence[Row]
    results: Path
    scratch: Path
    shard: tuple[int, int] = (1, 1)
    seed: int = 0
    count: int | None = None
    stop_after: int = 10

    def todo(self, known: Iterable[tuple[int, int, int]]) -> list[tuple[Row, int, dict[str, Any]]]:
        """The cases of this shard that have no result yet."""
        have, found = set(known), []
        for row in self.chosen:
            every = row.cases(row.FULL if self.count is None else min(self.count, row.FULL), self.seed)
            for index in range(self.shard[0] - 1, len(every), self.shard[1]):
                if (row.NUMBER, index, self.seed) not in have:
                    found.append((row, index, every[index]))
        return found


def run_plan(plan: Plan, report: Callable[[str], None]) -> bool:
    """Runs what has no result yet; whether everything in this shard that has one is ok.

    Gives up after ``stop_after`` cases that are not ok: what is broken stays broken.
    """
    known, stale = read_results([plan.results], plan.chosen)
    todo = plan.todo(known)
    report(f"{len(todo)} cases to run; {stale} results of other sources passed over")
    plan.results.parent.mkdir(parents=True, exist_ok=True)
    bad, begun = 0, time.monotonic()
    with Pools() as pools, plan.results.open("a", encoding="utf-8") as file:
        for done, (row, index, case) in enumerate(todo, 1):
            try:
                record = run_case(row, index, plan.seed, case, plan.scratch, pools)
            except Unavailable as reason:
                report(f"skip row {row.NUMBER} case {index}: {reason}")
                continue
            file.write(json.dumps(asdict(record)) + "\n")
            file.flush()
            bad += record.verdict != "ok"
            left = (time.monotonic() - begun) / done * (len(todo) - done) / 60
            report(f"{describe(record)} {done}/{len(todo)}, {left:.0f} min left")
            if bad >= plan.stop_after:
                report(f"{bad} cases are not ok: stopped. What they left is under {plan.scratch}")
                break
    return bad == 0


def describe(record: Record) -> str:
    """One line of an ok case, all that is known of another one."""
    where = f"row {record.row} case {record.index} seed {record.seed} ({record.seconds:.1f} s)"
    if record.verdict == "ok":
        return f"ok   {where} {record.detail.splitlines()[0][:80] if record.detail else ''}"
    return f"FAIL {where}: {record.verdict}\n{json.dumps(record.case)}\n{record.detail}\n"
