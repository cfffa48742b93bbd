"""What the results file says, row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from tests.faults.harness import VERDICTS, Record, Row, read_results


def print_table(
    every: Mapping[int, Row], paths: Sequence[Path], report: Callable[[str], None], *, complete: bool = False
) -> bool:
    """Prints every row's counts; whether there are results and all are ok.

    Args:
        every: the rows by number.
        paths: results files; shards of other machines may lie in files of their own.
        report: takes a line.
        complete: whether a row with fewer cases than its full number is a failure too.
    """
    known, stale = read_results(paths, every.values())
    report(
        f"{'row':>3} {'fault':<44}{'cases':>7}{'of':>6}"
        + "".join(f"{v:>8}" for v in VERDICTS)
        + "  seeds, minutes"
    )
    held = bool(known)
    for number, row in every.items():
        records = [record for record in known.values() if record.row == number]
        held &= all(record.verdict == "ok" for record in records)
        held &= not complete or len(records) >= row.FULL
        report(_line(row, records))
        if tally := _tally(records):
            report(f"    {tally}")
    for record in known.values():
        if record.verdict != "ok":
            last = (record.detail.strip().splitlines() or [""])[-1][:200]
            report(f"FAIL row {record.row} case {record.index} seed {record.seed}: {record.verdict}: {last}")
    report(f"{len(known)} results in all; {stale} of other sources passed over")
    return held


def _line(row: Row, records: Sequence[Record]) -> str:
    counts = Counter(record.verdict for record in records)
    seeds = ",".join(map(str, sorted({record.seed for record in records}))) or "-"
    minutes = sum(record.seconds for record in records) / 60
    return (
        f"{row.NUMBER:>3} {row.TITLE[:43]:<44}{len(records):>7}{row.FULL:>6}"
        + "".join(f"{counts[v]:>8}" for v in VERDICTS)
        + f"  {seeds}, {minutes:.1f}"
    )


def _tally(records: Iterable[Record]) -> str:
    counts = Counter(
        record.detail.split(":")[0] for record in records if record.verdict == "ok" and ":" in record.detail
    )
    return ", ".join(f"{name} {count}" for name, count in counts.most_common(8))
