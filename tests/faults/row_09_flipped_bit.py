"""Row 9: one flipped bit in any file of a checkpoint is found, the file is named, and the one before is resumed.

The files are hit in turn, each at a random bit. Verification must refuse the checkpoint and name the file; so must
every part of a resume that reads the file, without changing what it would have filled. The checkpoint before it must
verify and load to what was written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.faults import fallback, specimen
from tests.faults.harness import Outcome, Pools, rng

NUMBER = 9
TITLE = "one flipped bit in any file"
FULL = 1000
SHARE = 40
SOURCES = (*fallback.SOURCES, "tests/faults/specimen.py", "tests/faults/fallback.py")


def cases(count: int, seed: int) -> list[dict[str, Any]]:
    """Files in turn; where in the file as a fraction of its bits."""
    return [{"file": i, "place": rng(NUMBER, i, seed).random()} for i in range(count)]


def run(case: dict[str, Any], scratch: Path, pools: Pools) -> Outcome:
    """Flips, and asks all readers."""
    names = specimen.files(pools)
    name, folder = names[case["file"] % len(names)], specimen.copies(pools, scratch)
    victim = folder / specimen.NEW / name
    data = bytearray(victim.read_bytes())
    bit = int(case["place"] * 8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    victim.write_bytes(data)
    problem = fallback.examine(pools, folder, name)
    return Outcome("silent", f"{name} bit {bit}: {problem}") if problem else Outcome("ok", name)
