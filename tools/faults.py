"""The fault matrix, by one command: `python tools/faults.py run` runs every case that has no result yet.

    tools/faults.py run [--rows 1 9] [--shard 1/4] [--seed 0] [--count 20]    as many cases as the matrix says
    tools/faults.py table [--complete]                                       row by row; fails unless all are ok

Results are lines of JSON under --results (default .faults/results.jsonl); cases already there for the present
sources are not run again, so that a run may be interrupted at any time. Shards may run side by side, with one file or
several. A case that is not ok keeps its folder under --scratch. Run as root, the tool works in a mount namespace of
its own, in which the small disks that it fills leave nothing behind.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.faults.harness import Plan, Row, rows, run_plan  # noqa: E402 - found by the line above
from tests.faults.table import print_table  # noqa: E402

_ISOLATED = "NEURON_LIGHTNING_FAULTS_ISOLATED"


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"a shard is i/n with 1 <= i <= n, not {text!r}")
    return int(index), int(count)


def _chosen(every: dict[int, Row], numbers: Sequence[int] | None) -> dict[int, Row]:
    if unknown := set(numbers or ()) - set(every):
        raise SystemExit(f"there is no row {sorted(unknown)}; rows: {list(every)}")
    return {number: row for number, row in every.items() if not numbers or number in numbers}


def _isolate() -> None:
    """Starts again in a mount namespace of its own, where that is allowed."""
    unshare = shutil.which("unshare")
    if os.environ.get(_ISOLATED) or unshare is None or os.geteuid() != 0:
        return
    if subprocess.run([unshare, "--mount", "true"], capture_output=True).returncode == 0:
        os.environ[_ISOLATED] = "1"
        os.execv(unshare, [unshare, "--mount", sys.executable, *sys.argv])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 if everything that was asked for holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--rows", type=int, nargs="+", help="only these rows of the matrix")
    parser.add_argument("--shard", type=_shard, default=(1, 1), help="i/n: the i-th of n parts of every row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="at most so many cases of each row")
    parser.add_argument("--results", type=Path, nargs="+", default=[ROOT / ".faults" / "results.jsonl"])
    parser.add_argument("--scratch", type=Path, default=ROOT / ".faults" / "scratch")
    parser.add_argument("--stop-after", type=int, default=10, help="give up after so many failures")
    parser.add_argument("--complete", action="store_true", help="table: fail unless every case has run")
    options = parser.parse_args(arguments)
    if options.what == "run" and arguments is None:
        _isolate()
    chosen = _chosen(rows(), options.rows)
    if options.what == "table":
        return 0 if print_table(chosen, options.results, print, complete=options.complete) else 1
    plan = Plan(
        chosen=list(chosen.values()),
        results=options.results[0],
        scratch=options.scratch.resolve(),
        shard=options.shard,
        seed=options.seed,
        count=options.count,
        stop_after=options.stop_after,
    )
    return 0 if run_plan(plan, lambda line: print(line, flush=True)) else 1


if __name__ == "__main__":
    sys.exit(main())
