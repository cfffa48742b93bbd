"""Checkpoints against their peers: synchronous saves, loads from a cold cache, asynchronous saves.

Usage: tools/bench/checkpoint.py [--quick] [--rounds 10] [--tables save load async] [--folder DIR] [--out FILE.json]

Two ranks stay up for the whole run and hold a tensor-parallel Llama with its AdamW state (about 485 MB together).
Every round runs all rows of a table, in an order that rotates; each row saves or loads the same bytes. Before a row
starts, everything written before is on disk; before a load, the files' pages are dropped from the page cache
(``posix_fadvise``), and the share that was then really read from the disk is printed. Ratios are taken within a round.
The first round warms up: it is shown as "first", and no median contains it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from step import cpu_name, cpu_seconds, free_port, installed  # noqa: E402

Record = dict[str, Any]
Table = dict[str, list[Record]]

WANTED = (
    ("save", "seconds", "ours", ("torch.save", "safetensors", "torch.distributed.checkpoint"), 0.95),
    ("save", "seconds", "ours", ("raw write + fsync",), 0.80),
    ("load", "seconds", "ours", ("torch.load", "safetensors", "torch.distributed.checkpoint"), 0.95),
    ("async", "blocked", "ours", ("plain copy",), 1 / 1.2),
    ("async", "seconds", "ours", ("torch.distributed.checkpoint", "…, staging memory kept"), 1.0),
)
"""(table, figure, row, peers, how fast the row must be as a share of the fastest peer): medians over rounds."""


def main() -> int:
    """Measures, prints; the exit status says whether all that is wanted holds."""
    options = parse()
    describe(options)
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        before, began = cpu_seconds(), time.monotonic()
        result = run(options, Path(scratch))
        after, elapsed = cpu_seconds(), time.monotonic() - began
    busy = max(0.0, (after[0] - before[0]) - (after[1] - before[1])) / elapsed
    print(f"{result['bytes'] / 1e6:.0f} MB of state; other programs used {busy:.2f} cores meanwhile")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    tables: dict[str, Table] = defaultdict(lambda: defaultdict(list))
    for record in result["records"]:
        tables[record["table"]][record["name"]].append(record)
    for name, table in tables.items():
        report(name, table, result["bytes"])
    return 0 if options.quick else check(tables)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workload", default="small")
    parser.add_argument(
        "--tables", nargs="+", choices=("save", "load", "async"), default=["save", "load", "async"]
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".bench", help="on the disk to be measured")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round: does it all run?")
    parser.add_argument("--out", type=Path, help="write every measurement to this JSON file")
    options = parser.parse_args()
    if options.quick:
        options.workload, options.rounds = "tiny", 1
    return options


def describe(options: argparse.Namespace) -> None:
    """Prints what the figures depend on."""
    packages = ("neuron-lightning", "torch", "safetensors")
    print(", ".join(f"{name} {installed(name)}" for name in packages), f"python {platform.python_version()}")
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    sha = "with" if "sha_ni" in flags else "without"
    print(f"{cpu_name()} {sha} SHA instructions, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"model {options.workload}, 2 ranks, 1 thread each, {options.rounds} rounds")


def run(options: argparse.Namespace, scratch: Path) -> Record:
    """Both ranks, until they have finished."""
    output = scratch / "result.json"
    arguments = ["--workload", options.workload, "--rounds", str(options.rounds), "--tables", *options.tables]
    arguments += ["--scratch", str(scratch), "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_PORT": free_port(), "LOCAL_WORLD_SIZE": "2"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "checkpoint_rank.py"), *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    codes = [process.wait() for process in ranks]
    if any(codes):
        raise SystemExit(f"the ranks ended with {codes}")
    result: Record = json.loads(output.read_text(encoding="utf-8"))
    return result


def figures(rows: list[Record], key: str) -> dict[int, float]:
    """By round, without the first."""
    return {row["round"]: row[key] for row in rows if row["round"]}


def report(title: str, table: Table, size: int) -> None:
    """Prints one table: medians, and how much slower each row is than ours, round by round."""
    for key in ("blocked", "seconds") if title == "async" else ("seconds",):
        ours = figures(table["ours"], key)
        print(f"\n{title}, {key} (median over rounds; ratio to ours: median [lowest, highest])")
        print(f"  {'':44} {'s':>7} {'GB/s':>6} {'ratio':>6} {'spread':>14} {'first':>7}")
        for name, rows in table.items():
            found = figures(rows, key)
            ratios = [found[turn] / ours[turn] for turn in ours]
            first = next(row[key] for row in rows if row["round"] == 0)
            median = statistics.median(found.values())
            note = ""
            if title == "load":
                share = statistics.median(row["disk_share"] for row in rows if row["round"])
                note = f"  {100 * share:.0f} % read from disk"
            print(
                f"  {name:44} {median:7.3f} {size / median / 1e9:6.2f} {statistics.median(ratios):6.2f} "
                f"[{min(ratios):5.2f}, {max(ratios):5.2f}] {first:7.3f}{note}"
            )


def check(tables: dict[str, Table]) -> int:
    """Compares with what is wanted; returns the exit status."""
    print()
    failed = False
    for title, key, name, peers, wanted in WANTED:
        if title not in tables:
            continue
        medians = {
            row: statistics.median(figures(tables[title][row], key).values()) for row in (name, *peers)
        }
        best = min(peers, key=lambda peer: medians[peer])
        share = medians[best] / medians[name]
        good = share >= wanted
        failed |= not good
        print(
            f"{'holds' if good else 'MISSED'}: {title} {key}: {name} is at {share:.2f} of {best} (wanted {wanted:.2f})"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
