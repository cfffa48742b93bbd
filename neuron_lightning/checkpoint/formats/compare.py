"""Two checkpoints side by side: what is in one only, and how the values differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from neuron_lightning.checkpoint.formats.contents import (
    Contents,
    Counter,
    Entry,
    Progress,
    as_bytes,
    silent,
    slices,
)


@dataclass(frozen=True)
class Difference:
    """One name that is not the same in both.

    Attributes:
        name: of the tensor, or of a number of optimizer state.
        what: ``only in the first``, ``only in the second``, or how they differ.
        largest: greatest absolute difference of two values, if they can be compared; nan where only one is nan.
    """

    name: str
    what: str
    largest: float | None = None


def differences(first: Contents, second: Contents, progress: Progress = silent) -> list[Difference]:
    """What is not bit for bit the same, by name; tensors are read slice by slice."""
    common = first.tensors.keys() & second.tensors.keys()
    count = Counter(progress, "compare", sum(first.tensors[name].nbytes for name in common))
    found = _one_sided(
        first.tensors.keys() | first.aliases.keys(), second.tensors.keys() | second.aliases.keys()
    )
    for name in sorted(common):
        a, b = first.tensors[name], second.tensors[name]
        if (difference := _compare(name, a, b)) is not None:
            found.append(difference)
        count(a.nbytes)
    for owner in sorted(first.scalars.keys() | second.scalars.keys()):
        a_numbers, b_numbers = first.scalars.get(owner, {}), second.scalars.get(owner, {})
        for key in sorted(a_numbers.keys() | b_numbers.keys()):
            x, y = a_numbers.get(key), b_numbers.get(key)
            if x != y:
                largest = abs(x - y) if x is not None and y is not None else None
                found.append(Difference(f"{owner}/{key}", f"{x} against {y}", largest))
    return found


def _one_sided(first: set[str], second: set[str]) -> list[Difference]:
    sides = ((first - second, "only in the first"), (second - first, "only in the second"))
    return [Difference(name, what) for names, what in sides for name in sorted(names)]


def _compare(name: str, a: Entry, b: Entry) -> Difference | None:
    if a.shape != b.shape:
        return Difference(name, f"shape {list(a.shape)} against {list(b.shape)}")
    kinds = "" if a.dtype == b.dtype else f"{_short(a.dtype)} against {_short(b.dtype)}, "
    largest, unequal = 0.0, 0
    for box in slices(a.shape, max(a.dtype.itemsize, b.dtype.itemsize)):
        x, y = a.read(box), b.read(box)
        if not kinds and torch.equal(as_bytes(x), as_bytes(y)):
            continue
        wide = (x.to(torch.float64) - y.to(torch.float64)).abs()
        same = (x == y) | (x.isnan() & y.isnan()) if x.dtype.is_floating_point else x == y
        unequal += int((~same).sum())
        wide = wide[~same]
        if wide.numel():
            largest = _larger(largest, float(wide.max()))
    if not unequal and not kinds:
        return None
    share = f"{unequal:,} of {math.prod(a.shape):,} values differ"
    return Difference(name, kinds + share, largest)


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
