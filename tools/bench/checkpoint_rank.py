"""One rank of the checkpoint benchmark; both stay up for the whole run. Started by checkpoint.py."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import checkpoint_rows as rows
import torch
import torch.distributed as dist
from workload import WORKLOADS

from neuron_lightning.backends import get_backend

Record = dict[str, Any]


def main() -> None:
    """Runs the tables; rank 0 writes every measurement."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=sorted(WORKLOADS), required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--tables", nargs="+", required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    state = rows.State(WORKLOADS[options.workload])
    records: list[Record] = []
    for table in options.tables:
        records += TABLES[table](state, options.rounds, options.scratch)
    size = torch.tensor(sum(t.numel() * t.element_size() for t in state.written().values()))
    dist.all_reduce(size)
    if dist.get_rank() == 0:
        options.output.write_text(json.dumps({"bytes": size.item(), "records": records}), encoding="utf-8")
    dist.barrier()
    get_backend().destroy_process_group()


def rotated(names: list[str], turn: int) -> list[str]:
    """The order of one round."""
    return names[turn % len(names) :] + names[: turn % len(names)]


def timed(work: Callable[[], None]) -> float:
    """Seconds until both ranks have done it."""
    if dist.get_rank() == 0:
        os.sync()
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def removed(folder: Path) -> None:
    """Rank 0 removes it."""
    dist.barrier()
    if dist.get_rank() == 0:
        rows.clear(folder)
    dist.barrier()


def measure_saves(state: rows.State, rounds: int, scratch: Path) -> list[Record]:
    """Synchronous saves; round 0 warms up and does not count."""
    records = []
    for turn in range(rounds + 1):
        for name in rotated(list(rows.SAVES), turn):
            folder = scratch / "save"
            seconds = timed(partial(rows.SAVES[name], state, folder))
            removed(folder)
            records.append({"table": "save", "name": name, "round": turn, "seconds": seconds})
    return records


def measure_loads(state: rows.State, rounds: int, scratch: Path) -> list[Record]:
    """Loads of files that are on disk only; disk_bytes says how much was really read from it."""
    for name, save in rows.SAVES.items():
        if name in {writer for writer, _ in rows.LOADS.values()}:
            save(state, scratch / name)
    dist.barrier()
    os.sync()
    records = []
    variants = [(name, verify) for name in rows.LOADS for verify in (True, False)]
    names = [f"{name}{'' if verify else ' (unverified)'}" for name, verify in variants]
    table = dict(zip(names, variants, strict=True))
    for turn in range(rounds + 1):
        for label in rotated(names, turn):
            name, verify = table[label]
            writer, load = rows.LOADS[name]
            if dist.get_rank() == 0:
                size = sum(rows.evict(scratch / writer))
            before = disk_bytes()
            seconds = timed(partial(load, state, scratch / writer, verify=verify))
            read = torch.tensor(disk_bytes() - before)
            dist.all_reduce(read)
            if dist.get_rank() == 0:
                records.append(
                    {"table": "load", "name": label, "round": turn, "seconds": seconds}
                    | {"disk_share": read.item() / size}
                )
    for writer, _ in rows.LOADS.values():
        removed(scratch / writer)
    return records


def disk_bytes() -> int:
    """Bytes that this process has read from disk."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
    return int(fields["read_bytes"])


def measure_asyncs(state: rows.State, rounds: int, scratch: Path) -> list[Record]:
    """How long a save blocks, and after how long it is durable; round 0 is the first save of each."""
    peers = {name: make(state) for name, make in rows.ASYNCS.items()}
    records = []
    for turn in range(rounds + 1):
        for name in rotated(list(peers), turn):
            folder, blocked = scratch / "async", 0.0

            def work(peer: Any = peers[name], folder: Path = folder) -> None:
                nonlocal blocked
                start = time.perf_counter()
                peer.start(folder)
                blocked = time.perf_counter() - start
                peer.finish()

            seconds = timed(work)
            slowest = torch.tensor(blocked, dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            removed(folder)
            records.append(
                {"table": "async", "name": name, "round": turn, "seconds": seconds}
                | {"blocked": slowest.item()}
            )
    for peer in peers.values():
        peer.close()
    return records


TABLES = {"save": measure_saves, "load": measure_loads, "async": measure_asyncs}

if __name__ == "__main__":
    main()
