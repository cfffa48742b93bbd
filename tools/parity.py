"""Parity, by one command: `python tools/parity.py` prints every worst deviation and fails if one is too large.

    tools/parity.py                          all of the below; the grid goes on where it was left
    tools/parity.py hf                       one rank against Hugging Face in fp32
    tools/parity.py bf16                     bf16 against fp32, beside Hugging Face's own
    tools/parity.py grid [--shard 1/4]       the layouts against one rank in float64 (a part of the cells)
    tools/parity.py table                    worst deviations of the grid, by value of every axis

Grid results are lines of JSON under --results (default .parity/results.jsonl); cells already there for the present
sources are not run again. Shards may run at the same time on different machines, each with its own file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from neuron_lightning.testing import RankPool  # noqa: E402 - found by the line above
from tests.parity.cells import Cell, grid, pairwise  # noqa: E402
from tests.parity.training import STEPS, TOLERANCE, Deviations, run_cell  # noqa: E402

SOURCES = (
    *(f"neuron_lightning/{folder}/*.py" for folder in ("backends", "models", "optim", "parallel")),
    "neuron_lightning/checkpoint/boxes.py",
    "tests/parity/cells.py",
    "tests/parity/training.py",
)
METRICS = ("loss", "grad_norm", "weight", "copies")


def fingerprint() -> str:
    """Digest of the sources that a cell's result depends on."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_grid(results: Path, shard: tuple[int, int], subset: bool) -> bool:
    """Runs the cells of ``shard`` that have no result; returns whether all of the shard pass."""
    sources = fingerprint()
    known, stale = read_results(results, sources)
    cells = pairwise(grid()) if subset else grid()
    mine = sorted(cells, key=lambda cell: cell.world_size)[shard[0] - 1 :: shard[1]]
    todo = [cell for cell in mine if str(cell) not in known]
    print(
        f"grid: {len(mine)} cells, {len(mine) - len(todo)} known, {stale} results of other sources passed over"
    )
    results.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with results.open("a", encoding="utf-8") as file:
        for done, (cell, deviations, seconds) in enumerate(_run(todo), 1):
            record = {"sources": sources, "cell": str(cell), "axes": cell.axes(), "steps": STEPS}
            record |= {**asdict(deviations), "seconds": round(seconds, 2)}
            file.write(json.dumps(record) + "\n")
            file.flush()
            known[str(cell)] = record
            left = (time.monotonic() - begun) / done * (len(todo) - done) / 60
            verdict = "ok  " if deviations.passed else "FAIL"
            print(
                f"{verdict} {done}/{len(todo)} {cell}: worst {deviations.worst:.1e}, {seconds:.1f} s, "
                f"{left:.0f} min left",
                flush=True,
            )
    return all(_passed(known[str(cell)]) for cell in mine)


def _run(cells: Sequence[Cell]) -> Iterator[tuple[Cell, Deviations, float]]:
    """Cells in turn, in one pool of warm ranks per world size."""
    for world_size in sorted({cell.world_size for cell in cells}):
        with RankPool(world_size) as pool:
            for cell in cells:
                if cell.world_size == world_size:
                    begun = time.monotonic()
                    yield cell, run_cell(cell, pool), time.monotonic() - begun


def read_results(results: Path, sources: str) -> tuple[dict[str, dict[str, Any]], int]:
    """Results by cell for these sources, and how many lines are of others (or were cut off)."""
    known: dict[str, dict[str, Any]] = {}
    stale = 0
    for line in results.read_text(encoding="utf-8").splitlines() if results.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            record = {}
        if record.get("sources") == sources and record.get("steps") == STEPS:
            known[record["cell"]] = record
        else:
            stale += 1
    return known, stale


def print_table(results: Path) -> bool:
    """Prints the worst deviations; returns whether there are results and none is beyond tolerance."""
    known, _ = read_results(results, fingerprint())
    cells = {str(cell): cell.axes() for cell in grid()}
    records = [record for name, record in known.items() if name in cells]
    print(
        f"\nlayouts against one rank, float64, {STEPS} steps: {len(records)} of {len(cells)} cells have run"
    )
    if not records:
        return False
    print(f"{'axis':<14}{'value':<10}{'cells':>6}" + "".join(f"{m:>12}" for m in METRICS))
    for axis in next(iter(cells.values())):
        for value in dict.fromkeys(axes[axis] for axes in cells.values()):
            _print_row(axis, value, [r for r in records if r["axes"][axis] == value])
    _print_row("all", "", records)
    failed = [record for record in records if not _passed(record)]
    for record in failed:
        print(f"FAIL {record['cell']}: " + ", ".join(f"{m} {record[m]:.2e}" for m in METRICS))
    seconds = sum(record["seconds"] for record in records)
    print(
        f"tolerance {TOLERANCE:.0e}, copies must be equal; {len(failed)} failed; {seconds / 60:.0f} min in all"
    )
    return not failed


def _print_row(axis: str, value: Any, records: Sequence[dict[str, Any]]) -> None:
    worst = [max((r[m] for r in records), default=float("nan")) for m in METRICS]
    print(f"{axis:<14}{value!s:<10}{len(records):>6}" + "".join(f"{w:>12.1e}" for w in worst))


def _passed(record: dict[str, Any]) -> bool:
    return max(record[m] for m in METRICS[:3]) <= TOLERANCE and record["copies"] == 0.0


def print_huggingface(which: str) -> bool:
    """Prints the comparison with Hugging Face; returns whether it holds."""
    from tests.parity import huggingface

    if which == "hf":
        title = f"one rank against Hugging Face, fp32, {huggingface.STEPS} steps, lr {huggingface.LR:g}"
        table = huggingface.fp32_table()
        failures = huggingface.fp32_failures(table)
        rule = f"step 1 <= {huggingface.FIRST_STEP_TOLERANCE:.0e}, loss and grad norm <= {huggingface.TOLERANCE:.0e}"
    else:
        title = f"bf16 against Hugging Face in fp32, {huggingface.STEPS} steps"
        table = huggingface.bf16_table()
        failures = huggingface.bf16_failures(table)
        rule = f"at most {huggingface.BF16_FACTOR:g} x Hugging Face's own: loss, grad norm, logits"
    print(f"\n{title}")
    columns = list(next(iter(table.values())))
    print(" " * 28 + "".join(f"{name:>19}" for name in columns))
    for row, values in table.items():
        print(f"{row:<28}" + "".join(f"{values[name]:>19.1e}" for name in columns))
    print(rule + ("" if not failures else "\nFAIL " + "\nFAIL ".join(failures)))
    return not failures


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"a shard is i/n with 1 <= i <= n, not {text!r}")
    return int(index), int(count)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 if everything that was asked for holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("all", "hf", "bf16", "grid", "table"), default="all")
    parser.add_argument("--shard", type=_shard, default=(1, 1), help="i/n: the i-th of n parts of the grid")
    parser.add_argument("--results", type=Path, default=ROOT / ".parity" / "results.jsonl")
    parser.add_argument("--pairwise", action="store_true", help="only the cells that `make test` runs")
    options = parser.parse_args(arguments)
    held = True
    if options.what in ("all", "hf"):
        held &= print_huggingface("hf")
    if options.what in ("all", "bf16"):
        held &= print_huggingface("bf16")
    if options.what in ("all", "grid"):
        held &= run_grid(options.results, options.shard, options.pairwise)
    if options.what in ("all", "table"):
        held &= print_table(options.results)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
