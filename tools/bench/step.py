"""tokens/s and MFU of a training step: ours against the peers, each in fresh processes, in turns.

Usage: tools/bench/step.py [--quick] [--rounds 3] [--steps 3] [--only NAME …] [--out FILE.json]

Every round runs all rows of a table in an order that rotates; ratios are taken within a round, to the first row.
All rows train the same global batches from the same weights, so their losses must agree; the run fails if they
do not. MFU is the model's FLOP (causal attention counted half) over what ``torch.mm`` reaches at the model's own
shapes, on all ranks at once, in the same round. A row during which other programs used the machine is thrown
away and taken again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from peers import PEERS, TABLES  # noqa: E402
from workload import WORKLOADS, Workload  # noqa: E402

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest relative difference of a loss from the first row's."""
BUSY_CORES = 0.2
"""How many cores other programs may have used while a row ran."""
ATTEMPTS = 3

Record = dict[str, Any]


def main() -> int:
    """Measures, prints the tables; the exit status says whether all losses agree."""
    options = parse()
    workload = WORKLOADS[options.workload]
    describe(options, workload)
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as scratch:
        start_ranks("prepare", 1, options, "float32", Path(scratch))
        for dtype in options.dtypes:
            for title, names in TABLES.items():
                rows = [name for name in names if not options.only or name in options.only]
                if rows:
                    records += measure_table(title, rows, dtype, options, Path(scratch))
    if options.out:
        options.out.write_text(json.dumps(records, indent=1), encoding="utf-8")
    wrong = report(records, workload)
    for line in wrong:
        print(f"LOSSES DISAGREE: {line}")
    return 1 if wrong else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per row and round")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="small")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(TOLERANCE), default=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", choices=sorted(PEERS), help="only these rows")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round: does it all run?")
    parser.add_argument("--keep-busy", action="store_true", help="keep rows measured on a busy machine")
    parser.add_argument("--out", type=Path, help="write every measurement to this JSON file")
    options = parser.parse_args()
    if options.quick:
        options.workload, options.rounds = "tiny", 1
    return options


def describe(options: argparse.Namespace, workload: Workload) -> None:
    """Prints what the figures depend on."""
    packages = ("neuron-lightning", "torch", "lightning", "transformers")
    print(", ".join(f"{name} {installed(name)}" for name in packages), f"python {platform.python_version()}")
    print(f"{cpu_name()}, {os.cpu_count()} cores, 1 thread a process, load {os.getloadavg()[0]:.1f}")
    print(f"model {options.workload}: {workload.asdict()}")


def installed(package: str) -> str:
    """Version, or that the source tree is used."""
    try:
        return version(package)
    except ModuleNotFoundError:
        return "(source tree)"


def cpu_name() -> str:
    """The processor's own name for itself."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "cpu")


def measure_table(
    title: str, names: list[str], dtype: str, options: argparse.Namespace, scratch: Path
) -> list[Record]:
    """All rounds of one table in one dtype."""
    world_size = PEERS[names[0]].world_size
    records = []
    for index in range(options.rounds):
        ceiling = start_ranks("matmul", world_size, options, dtype, scratch)["flops"]
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            record = measure(name, dtype, options, scratch)
            record |= {"table": title, "name": name, "dtype": dtype, "round": index, "mm_flops": ceiling}
            records.append(record)
            note = "" if record["kept"] else f"  thrown away: others used {record['busy']:.2f} cores"
            print(
                f"  {dtype} round {index + 1} {PEERS[name].label}: {record['seconds']:.2f} s/step{note}",
                flush=True,
            )
    return records


def measure(name: str, dtype: str, options: argparse.Namespace, scratch: Path) -> Record:
    """One row in one round; again, up to a limit, while the machine is busy otherwise."""
    record: Record = {}
    for _ in range(ATTEMPTS):
        record = start_ranks(name, PEERS[name].world_size, options, dtype, scratch)
        record["kept"] = record["busy"] <= BUSY_CORES or options.keep_busy
        if record["kept"]:
            break
    return record


def start_ranks(job: str, world_size: int, options: argparse.Namespace, dtype: str, scratch: Path) -> Record:
    """Runs ``job`` on fresh processes; its result, with the cores that other programs used meanwhile."""
    output = scratch / "result.json"
    arguments = ["--workload", options.workload, "--dtype", dtype, "--weights", str(scratch / "weights")]
    arguments += ["--steps", str(options.steps), "--warmup", str(options.warmup), "--output", str(output)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    environment |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    before, began = cpu_seconds(), time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "rank.py"), job, *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    failed = []
    for rank, process in enumerate(ranks):
        _, errors = process.communicate()
        if process.returncode:
            failed.append(f"rank {rank} of {job} ({dtype}) ended with {process.returncode}:\n{errors}")
    if failed:
        raise SystemExit("\n".join(failed))
    after, elapsed = cpu_seconds(), time.monotonic() - began
    result: Record = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    output.unlink(missing_ok=True)
    result["busy"] = max(0.0, (after[0] - before[0]) - (after[1] - before[1])) / elapsed
    return result


def cpu_seconds() -> tuple[float, float]:
    """(whole machine, this program and its ended children): processor seconds used so far."""
    fields = [int(x) for x in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    machine = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return machine, sum(usage.ru_utime + usage.ru_stime for usage in own)


def free_port() -> str:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def report(records: list[Record], workload: Workload) -> list[str]:
    """Prints a table per title and dtype; returns what disagrees."""
    tables: dict[tuple[str, str], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        tables[record["table"], record["dtype"]][record["name"]].append(record)
    wrong = []
    for (title, dtype), rows in tables.items():
        first = next(iter(sorted(rows, key=TABLES[title].index)))
        print(f"\n{title}, {dtype} (ratio to the first row, median over rounds [lowest, highest])")
        print(f"  {'':36} {'tok/s':>8} {'ratio':>6} {'spread':>14} {'MFU':>5} {'rounds':>6}")
        for name in sorted(rows, key=TABLES[title].index):
            print(
                f"  {PEERS[name].label:36} "
                + row_text(rows[name], rows[first], workload, PEERS[name].world_size)
            )
            wrong += disagreements(name, rows[name], rows[first], TOLERANCE[dtype])
    return wrong


def row_text(row: list[Record], first: list[Record], workload: Workload, world_size: int) -> str:
    """The figures of one row."""
    kept = [record for record in row if record["kept"]]
    if not kept:
        return "no round on a quiet machine"
    tokens = workload.tokens(world_size)
    rates = [tokens / record["seconds"] for record in kept]
    mfu = [
        rate * workload.flop_per_token() / record["mm_flops"]
        for rate, record in zip(rates, kept, strict=True)
    ]
    base = {record["round"]: record["seconds"] for record in first if record["kept"]}
    ratios = [base[record["round"]] / record["seconds"] for record in kept if record["round"] in base]
    if not ratios:
        return f"{statistics.median(rates):8.0f}  no quiet round of the first row"
    return (
        f"{statistics.median(rates):8.0f} {statistics.median(ratios):6.2f} "
        f"[{min(ratios):5.2f}, {max(ratios):5.2f}] {statistics.median(mfu):5.2f} {len(kept):6d}"
    )


def disagreements(name: str, row: list[Record], first: list[Record], tolerance: float) -> list[str]:
    """Losses that are further from the first row's than rounding explains."""
    wanted = first[0]["losses"]
    return [
        f"{name}, round {record['round'] + 1}, step {step + 1}: {got:.6f} against {want:.6f}"
        for record in row
        for step, (got, want) in enumerate(zip(record["losses"], wanted, strict=True))
        if abs(got - want) > tolerance * abs(want)
    ]


if __name__ == "__main__":
    sys.exit(main())
