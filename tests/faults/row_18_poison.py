"""Row 18: whatever stands in a checkpoint folder, reading it executes nothing and touches nothing outside.

An attacker can write any bytes and seal the manifest again, so hashes are made to fit. Every part of a resume is then
tried, under Python's audit hook (no code run, no pickle, no file opened outside the checkpoint, nothing written) and
with an inotify watch on the folder that the poisoned paths point to (which sees libraries that are not Python too).
Only our own errors may come out, in bounded time and memory.

A fuzz case is a batch of :data:`BATCH` mutations: most of the manifest, by bytes and by structure with a fitting
digest, the rest of the typed JSON and of the headers of safetensors files. A manifest that still parses is then used.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from neuron_lightning.checkpoint import manifest
from neuron_lightning.errors import CheckpointError
from tests.faults import mutations, specimen, watch
from tests.faults.harness import Outcome, Pools
from tests.faults.mutations import flip, mutate, seal

NUMBER = 18
TITLE = "poisoned input; manifest fuzz"
BATCH = 500
BATCHES = 200
FILES = (
    "manifest.json", "trainer.json", "trainer.safetensors",
    *(f"rank-0000{rank}.{rest}" for rank in (0, 1) for rest in ("model.safetensors", "optimizer.safetensors", "state.json", "state.safetensors")),
)  # fmt: skip
NAMES = (
    "../outside/secret", "../../outside/secret", "/etc/passwd", "..", ".", "a/b", "a b", "x\x00y", "a\\..\\b", "manifest.json",
    "~root", "secret\n", "\N{FULLWIDTH FULL STOP}./x", "",
)  # fmt: skip
SHAPES = ([1 << 49], [1 << 25, 1 << 24], [1 << 62, 0], [0], [], [3, 1 << 30], [1] * 16 + [1 << 40], [1] * 10)
PREFIXES = ("model/", "optimizer.0/", "trainer/", "rank.1/")
SHARE_BATCHES = 1
SOURCES = (
    *(f"neuron_lightning/{folder}/*.py" for folder in ("checkpoint", "optim")),
    *(f"tests/faults/{name}.py" for name in ("specimen", "reshard_ranks", "watch", "mutations", "fallback")),
)


def _singles() -> list[dict[str, Any]]:
    slots = [
        {"kind": kind, "file": name, "sealed": sealed}
        for kind, name, sealed in itertools.product(("pickle", "torch.save"), FILES, (True, False))
    ]
    links = [{"kind": kind, "file": name} for kind in ("link", "fifo", "device") for name in FILES]
    paths = [{"kind": kind, "name": name} for kind in ("listed", "in a box", "renamed") for name in NAMES]
    types = [
        {"kind": "type", "file": name, "type": t}
        for name in FILES
        if name.endswith("n")
        for t in mutations.TYPES
    ]
    shapes = [
        {"kind": "shape", "prefix": p, "shape": shape} for p, shape in itertools.product(PREFIXES, SHAPES)
    ]
    return slots + links + paths + shapes + [case for case in types if case["file"] != "manifest.json"]


FULL = len(_singles()) + BATCHES
SHARE = len(_singles()) + SHARE_BATCHES


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """The single cases, then the batches of mutations."""
    batches = [{"kind": "fuzz", "seed": f"{seed}/{i}"} for i in range(BATCHES)]
    return [*_singles(), *batches][:count]


class Bomb:
    """Leaves a trace if it is ever unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """Poisons a copy, and reads it under watch."""
    folder = specimen.copies(pools, scratch) / specimen.NEW
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes((folder / "trainer.json").read_bytes())
    specimen.reader().attempts(folder)  # imports and caches
    if case["kind"] == "fuzz":
        return _fuzz(random.Random(case["seed"]), folder, outside, specimen.originals(pools) / specimen.NEW)
    poison(case, folder, outside)
    budget = watch.Budget()
    with watch.Watch(folder, outside) as watching, watching.looking(), budget.spent():
        error = specimen.verify(folder)
        refused = specimen.reader().attempts(folder)
    seen = watching.seen
    if seen or (outside / "exploded").exists():
        return Outcome("wrong", f"{case}: {seen}")
    if budget.exceeded:
        return Outcome("wrong", f"{case}: {budget.exceeded}")
    if (
        not error and not refused and case["kind"] != "type"
    ):  # some types hold a string without doing anything
        return Outcome("silent", f"{case} was read as a checkpoint")
    return Outcome("ok", case["kind"])


def poison(case: dict[str, Any], folder: Path, outside: Path) -> None:
    """Changes the checkpoint as the case says."""
    kind, victim = case["kind"], folder / case.get("file", "trainer.json")
    if kind in ("pickle", "torch.save"):
        beside = outside.parent / "bomb"
        torch.save(Bomb(outside / "exploded"), beside)
        data = pickle.dumps(Bomb(outside / "exploded")) if kind == "pickle" else beside.read_bytes()
        if case["sealed"]:
            mutations.replace_file(folder, victim.name, data)
        else:
            victim.write_bytes(data)
    elif kind == "type":
        value = {
            "$type": case["type"],
            "value": "os.system",
            "args": ["mkdir exploded"],
            "dtype": "O",
            "shape": [1],
        }
        mutations.replace_file(
            folder, victim.name, json.dumps({"trainer": value, "optimizers": value}).encode()
        )
    elif kind == "link":
        victim.rename(outside / victim.name)
        victim.symlink_to(outside / victim.name)
    elif kind == "fifo":
        victim.unlink()
        os.mkfifo(victim)
    elif kind == "device":
        victim.unlink()
        victim.symlink_to("/dev/zero")
    elif kind == "shape":
        _poison_shape(case, folder)
    else:
        _poison_name(case, folder)


def _poison_shape(case: dict[str, Any], folder: Path) -> None:
    """A tensor of another shape, all of it in one box."""
    document = mutations.unsealed(folder)
    tensor = next(record for name, record in document["tensors"].items() if name.startswith(case["prefix"]))
    box = {**tensor["boxes"][0], "offset": [0] * len(case["shape"]), "shape": case["shape"]}
    tensor.update(shape=case["shape"], boxes=[box])
    (folder / "manifest.json").write_bytes(seal(document))


def _poison_name(case: dict[str, Any], folder: Path) -> None:
    """A file name in the manifest that does not belong there."""
    document, name = mutations.unsealed(folder), case["name"]
    if case["kind"] == "listed":
        document["files"][name] = document["files"]["trainer.json"]
    elif case["kind"] == "renamed":
        document["files"][name] = document["files"].pop("rank-00000.model.safetensors")
        for tensor in document["tensors"].values():
            for box in tensor["boxes"]:
                if box["file"] == "rank-00000.model.safetensors":
                    box["file"] = name
    else:
        next(iter(document["tensors"].values()))["boxes"][0]["file"] = name
    (folder / "manifest.json").write_bytes(seal(document))


def _fuzz(random_: random.Random, folder: Path, outside: Path, original: Path) -> Outcome:
    """A batch of mutations; stops at the first that is not handled as it must be."""
    raw, document = (folder / "manifest.json").read_bytes(), mutations.unsealed(folder)
    used, budget = 0, watch.Budget()
    with watch.Watch(folder, outside) as watching:
        for number in range(BATCH):
            target = random_.choices(("structure", "bytes", "document", "tensors"), (70, 20, 5, 5))[0]
            if target in ("document", "tensors"):
                _mutate_file(target, random_, folder)
            else:
                data = flip(raw, random_) if target == "bytes" else seal(mutate(document, random_))
                with watching.looking(), budget.spent():
                    parses = _parses(data, folder)
                if data == raw or (not parses and not watching.seen and not budget.exceeded):
                    continue
                (folder / "manifest.json").write_bytes(data)
            used += 1
            with watching.looking(), budget.spent():
                specimen.verify(folder)
                specimen.reader().attempts(folder)
            if problem := watching.seen or budget.exceeded:
                return Outcome("wrong", f"mutation {number} ({target}): {problem}")
            _restore(folder, original)
    detail = f"{used} of them read, {budget.worst_cpu_s:.2f} s at most, +{budget.growth >> 20} MiB"
    return Outcome("ok", f"{BATCH} mutations: {detail}")


def _parses(data: bytes, folder: Path) -> bool:
    try:
        manifest.parse(data, f"{folder}/manifest.json")
    except CheckpointError:
        return False
    return True


def _mutate_file(target: str, random_: random.Random, folder: Path) -> None:
    ending = ".json" if target == "document" else ".safetensors"
    name = random_.choice([name for name in FILES if name.endswith(ending) and name != "manifest.json"])
    raw = (folder / name).read_bytes()
    if target == "document":
        data = json.dumps(mutate(json.loads(raw), random_)).encode()
    else:
        data = mutations.mutate_tensors(raw, random_)
    mutations.replace_file(folder, name, data)


def _restore(folder: Path, original: Path) -> None:
    for path in original.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
