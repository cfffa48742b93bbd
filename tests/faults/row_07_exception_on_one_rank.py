"""An exception on one rank: all end within 30 s, the first cause is named with its rank, nobody tries to save."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch.utils.data import TensorDataset

from tests.faults import drill
from tests.faults.crew import Crew, Trace, read_trace
from tests.faults.harness import Outcome, Pools, rng
from tests.faults.training import Job, train

NUMBER, TITLE = 7, "exception on one rank"
FULL, SHARE = 50, 4
PLACES = (
    "batch start",
    "before backward",
    "after backward",
    "before the step",
    "batch end",
    "dataset",
    "save",
)


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """Every place in turn, on either rank."""
    found = []
    for index in range(count):
        draw = rng(NUMBER, index, seed)
        case = {"job": asdict(drill.draw_job(draw)), "place": PLACES[index % len(PLACES)]}
        found.append({**case, "rank": draw.randrange(drill.WORLD), "batch": draw.randrange(1, 10)})
    return found


@dataclass(frozen=True)
class Trouble:
    """Raises on one rank, at the n-th time that the place is reached."""

    rank: int
    place: str
    number: int

    def __call__(self, job: Job, trace: Trace, folder: Path) -> list[Callback]:
        """See :func:`tests.faults.training.train`."""
        if int(os.environ["RANK"]) != self.rank:
            return []
        seen = iter(range(1, 1 << 30))

        def reached() -> None:
            if next(seen) == self.number:
                trace.mark("raise")
                raise ValueError(f"the data of rank {self.rank} is bad")

        if self.place == "dataset":
            read = TensorDataset.__getitem__

            def reads(dataset: TensorDataset, index: int) -> Any:
                reached()
                return read(dataset, index)

            TensorDataset.__getitem__ = reads  # type: ignore[method-assign]
            return []
        return [_Raising(self.place, reached)]


class _Raising(Callback):
    def __init__(self, place: str, reached: Any) -> None:
        hooks = {
            "batch start": "on_train_batch_start",
            "before backward": "on_before_backward",
            "after backward": "on_after_backward",
            "before the step": "on_before_optimizer_step",
            "batch end": "on_train_batch_end",
            "save": "on_save_checkpoint",
        }

        def hook(trainer: Any, *args: Any, **kwargs: Any) -> None:
            if place != "save" or trainer.global_step:  # before the first step the state is only checked
                reached()

        setattr(self, hooks[place], hook)


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """Raise, look, go on without the trouble, compare."""
    job, rank = Job(**case["job"]), case["rank"]
    ref = drill.reference(job)
    number = 1 + case["batch"] % 3 if case["place"] == "save" else case["batch"]
    try:
        took = _run_into(job, scratch, Trouble(rank, case["place"], number))
        found = drill.committed(scratch)
        drill.check_intact(ref, found)
        newest = max(found, default=0)
        drill.run_to_end(job, scratch, 1, str(found[newest]) if newest else None)
        drill.check_same(ref, scratch, 2)
    except AssertionError as error:
        return Outcome(drill.verdict_of(error), f"{error}\n{drill.outputs(scratch)}")
    return Outcome("ok", f"{case['place']}: {took:.1f} s")


def _run_into(job: Job, folder: Path, trouble: Trouble) -> float:
    """Seconds from the exception to the end of the last rank."""
    with Crew(drill.WORLD, train, job, str(folder), 0, None, trouble, folder=folder / "out-0") as crew:
        ended = crew.wait(drill.RUN_S + drill.END_S)
        end = time.monotonic()
        raised = [t for t, event in read_trace(folder / f"trace-0-{trouble.rank}") if event == "raise"]
        if not raised:
            raise drill.Wrong(f"the trouble did not come: {crew.codes}\n{crew.output()}")
        if not ended or end - raised[0] > drill.END_S:
            raise drill.Hang(f"{end - raised[0]:.0f} s after the exception: {crew.codes}\n{crew.output()}")
        if any(code is None or code <= 0 for code in crew.codes):
            raise drill.Wrong(f"the ranks ended with {crew.codes}\n{crew.output()}")
        _check_words(crew.output(), trouble.rank)
    saves = [(t, e) for t, e in read_trace(folder / "trace-0-0") if e in ("save", "parent_synced")]
    late = [e for t, e in saves if t > raised[0]]
    in_flight = sum(1 if e == "save" else -1 for t, e in saves if t <= raised[0])
    begins = trouble.place in (
        "save",
        "batch end",
    )  # the same boundary: rank 0 cannot know yet; but it must not commit
    if late.count("parent_synced") > in_flight or (late.count("save") and not begins):
        raise drill.Wrong(f"after the exception rank 0 went on to {late}")
    return end - raised[0]


def _check_words(output: str, rank: int) -> None:
    cause = f"rank {rank} failed first: ValueError: the data of rank {rank} is bad"
    others = [f"rank {other} stopped: {cause}" for other in range(drill.WORLD) if other != rank]
    missing = [text for text in others if text not in output]
    if missing or output.count("Traceback (most recent call last)") < 1:
        raise drill.Wrong(f"nobody says {missing}\n{output}")
