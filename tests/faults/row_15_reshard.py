"""Row 15: every layout of (tp, dp, ZeRO-1, sequence parallel) on 1, 2 and 4 ranks loads what every other one saved.

One case trains a model under a source layout, saves it, loads it under a target layout, and asks three things:

1. Gathered from the ranks' memory before the save and after the load, weights, master weights, both Adam moments,
   step counts and the groups' hyper-parameters are equal, bit for bit. Copies on several ranks are equal too.
2. The next 20 losses and gradient norms are those of an uninterrupted run that had the target layout from its first
   step, as far as the order of sums allows: relative 1e-10 in float64, 1e-5 in float32. bf16 is left out here,
   because two layouts that round activations to 8 bits differ in every step, with or without a checkpoint.
3. The first 5 of them are, bit for bit, those of a run of the target layout that resumed from its own checkpoint of
   that state, into a model that had been trained on something else.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.faults import reshard_ranks as ranks
from tests.faults.harness import Outcome, Pools
from tests.faults.reshard_ranks import Layout, Series, State

NUMBER = 15
TITLE = "reshard: every layout to every other"
FORMS = ("deduped", "sharded")
SOURCES = (
    *(
        f"neuron_lightning/{folder}/*.py"
        for folder in ("backends", "checkpoint", "models", "optim", "parallel")
    ),
    "tests/faults/reshard_ranks.py",
)
TOLERANCES = {"llama64": 1e-10, "plain64": 1e-10, "tied32": 1e-5}
LAYOUTS = {str(layout): layout for layout in ranks.layouts()}


@functools.cache
def _grid() -> list[dict[str, Any]]:
    """All pairs: the first model in both forms, the others in one form each, alternating."""
    grid = []
    for number, (source, target) in enumerate(itertools.product(LAYOUTS, LAYOUTS)):
        for kind in ranks.KINDS:
            if kind == "plain64" and (LAYOUTS[source].sp or LAYOUTS[target].sp):
                continue  # it has no layers between which a sequence could be cut
            forms = FORMS if kind == "llama64" else (FORMS[number % 2],)
            grid += [{"source": source, "target": target, "kind": kind, "form": form} for form in forms]
    return grid


FULL = len(_grid())
SHARE = len(LAYOUTS) // 2


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """The first ``SHARE`` have every layout as a source or a target, and all models and forms among them."""
    share = _share()
    rest = [case for case in _grid() if case not in share]
    random.Random(seed).shuffle(rest)
    return [*share, *rest][:count]


def _share() -> list[dict[str, Any]]:
    names, chosen = list(LAYOUTS), []
    for number, source in enumerate(names[:SHARE]):
        target = names[-1 - number]
        kind = ranks.KINDS[number % len(ranks.KINDS)]
        if kind == "plain64" and (LAYOUTS[source].sp or LAYOUTS[target].sp):
            kind = "llama64"
        pair = [c for c in _grid() if (c["source"], c["target"], c["kind"]) == (source, target, kind)]
        chosen.append(pair[number % len(pair)])
    return chosen


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """Trains, saves, loads under the other layout, trains on, and compares."""
    kind, source, target = case["kind"], LAYOUTS[case["source"]], LAYOUTS[case["target"]]
    path, own = str(scratch / "source"), str(scratch / "target")
    before = pools.get(source.world_size).run(ranks.rank_writes, kind, source, case["form"], path)
    resumed = pools.get(target.world_size).run(ranks.rank_resumes, kind, target, path, own)
    if problem := different_state(before, [state for state, _, _ in resumed]):
        return Outcome("wrong", problem)
    for _, resharded, own_series in resumed:
        first = Series(resharded.losses[: ranks.OWN], resharded.norms[: ranks.OWN])
        if not (torch.equal(first.losses, own_series.losses) and torch.equal(first.norms, own_series.norms)):
            return Outcome("wrong", f"not the steps of the target's own checkpoint: {first} {own_series}")
    if kind not in TOLERANCES:
        return Outcome("ok", kind)
    worst = deviation([series for _, series, _ in resumed], _uninterrupted(kind, target, pools))
    verdict = "ok" if worst <= TOLERANCES[kind] else "wrong"
    return Outcome(verdict, f"{kind}: largest relative difference to the uninterrupted run {worst:.1e}")


@functools.cache
def _uninterrupted(kind: str, layout: Layout, pools: Pools) -> list[Series]:
    return pools.get(layout.world_size).run(ranks.rank_runs_through, kind, layout)


def different_state(before: Sequence[State], after: Sequence[State]) -> str:
    """The first thing in which two sets of ranks differ, gathered; empty if there is none."""
    old, new = assemble(before), assemble(after)
    if old.keys() != new.keys():
        return f"names {sorted(old.keys() ^ new.keys())[:5]} are on one side only"
    for name, tensor in old.items():
        if tensor.dtype != new[name].dtype or not torch.equal(tensor, new[name]):
            return f"{name} differs by {(tensor.double() - new[name].double()).abs().max():.1e}"
    first, second = _scalars(before), _scalars(after)
    if first != second:
        return f"scalars {first} became {second}"
    return "" if before[0].options == after[0].options else f"options {before[0].options} {after[0].options}"


def _scalars(states: Sequence[State]) -> dict[str, dict[str, float]]:
    return {name: dict(numbers) for state in states for name, numbers in sorted(state.scalars.items())}


def assemble(states: Sequence[State]) -> dict[str, Tensor]:
    """The global tensors that ranks hold together; copies must be equal and every element must be held."""
    full: dict[str, Tensor] = {}
    known: dict[str, Tensor] = {}
    for state in states:
        for name, shape, offset, values in state.boxes:
            target = full.setdefault(name, torch.zeros(shape, dtype=values.dtype))
            seen = known.setdefault(name, torch.zeros(shape, dtype=torch.bool))
            index = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
            if not torch.equal(target[index][seen[index]], values[seen[index]]):
                raise AssertionError(f"ranks hold different copies of {name} at {offset}")
            target[index], seen[index] = values, True
    if holes := [name for name, seen in known.items() if not seen.all()]:
        raise AssertionError(f"no rank holds all of {holes[:5]}")
    return full


def deviation(runs: Sequence[Series], expected: Sequence[Series]) -> float:
    """The largest relative difference of a loss (mean over ranks) or a gradient norm."""
    loss, wanted = (torch.stack([s.losses for s in series]).mean(0) for series in (runs, expected))
    norm, wanted_norm = runs[0].norms, expected[0].norms
    return max(float(((a - b).abs() / b.abs()).max()) for a, b in ((loss, wanted), (norm, wanted_norm)))
