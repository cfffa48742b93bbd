"""Row 10: a truncated, missing, empty, additional or exchanged file is found, and the checkpoint before it resumed."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

from tests.faults import fallback, specimen
from tests.faults.harness import Outcome, Pools, rng

NUMBER = 10
TITLE = "truncated, missing, zero-length, extra, swapped-step file"
KINDS = ("truncated", "missing", "empty", "extra", "swapped step", "swapped ranks", "longer", "folder")
FULL = 200
SHARE = 32
SOURCES = (*fallback.SOURCES, "tests/faults/specimen.py", "tests/faults/fallback.py")


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """Kinds in turn, each on the files in turn."""
    return [
        {"kind": KINDS[i % len(KINDS)], "file": i // len(KINDS), "number": rng(NUMBER, i, seed).random()}
        for i in range(count)
    ]


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """Damages one file, and asks all readers."""
    names = specimen.files(pools)
    name, folder = names[case["file"] % len(names)], specimen.copies(pools, scratch)
    named = damage(case["kind"], folder, name, case["number"])
    problem = fallback.examine(pools, folder, named)
    return Outcome("silent", f"{case['kind']} {name}: {problem}") if problem else Outcome("ok", case["kind"])


def damage(kind: str, folder: Path, name: str, number: float) -> str | None:
    """Does it to ``name`` of the newer checkpoint. Returns the name that the error must hold; None: any will do."""
    victim = folder / specimen.NEW / name
    size = victim.stat().st_size
    if kind == "truncated":
        os.truncate(victim, max(1, int(number * size)) if size > 1 else 0)
    elif kind == "empty":
        os.truncate(victim, 0)
    elif kind == "missing":
        victim.unlink()
    elif kind == "longer":
        victim.write_bytes(victim.read_bytes() + b"\0")
    elif kind == "folder":
        victim.unlink()
        victim.mkdir()
    elif kind == "extra":
        name = random.Random(number).choice(
            ("rank-00002.model.safetensors", ".hidden", f"{name}.bak", "code.pkl")
        )
        shutil.copy(victim, victim.with_name(name))
    elif kind == "swapped step":
        shutil.copy(folder / specimen.OLD / name, victim)
        return None if name == "manifest.json" else name
    else:
        return _swap_ranks(victim)
    return name


def _swap_ranks(victim: Path) -> str:
    """Exchanges the file with the other rank's of the same kind; files of no rank with a file of rank 0."""
    name = victim.name
    if name.startswith("rank-"):
        other = victim.with_name(name.replace("00001", "?").replace("00000", "00001").replace("?", "00000"))
    else:
        other = victim.with_name("rank-00000.state.json")
    mine, theirs = victim.read_bytes(), other.read_bytes()
    victim.write_bytes(theirs)
    other.write_bytes(mine)
    return name if name == "manifest.json" else ""
