"""``neuron-lightning checkpoint inspect | verify | diff``: what a checkpoint holds, for people."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from neuron_lightning.checkpoint import commit
from neuron_lightning.checkpoint.formats import convert as formats
from neuron_lightning.checkpoint.formats import neuron
from neuron_lightning.checkpoint.formats.compare import Difference, differences
from neuron_lightning.checkpoint.formats.contents import Contents
from neuron_lightning.checkpoint.manifest import Manifest
from neuron_lightning.checkpoint.reader import Checkpoint
from neuron_lightning.errors import CheckpointError
from neuron_lightning.lightning.checkpoint_io import show_transfer
from neuron_lightning.models.llama_nxd import NXD_LLAMA

HELP = "inspect, verify or compare checkpoints"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three subcommands."""
    commands = parser.add_subparsers(dest="action", required=True)
    inspect = commands.add_parser("inspect", help="what a checkpoint of any format holds")
    inspect.add_argument("path", type=Path)
    inspect.add_argument("--all", action="store_true", help="list every tensor")
    inspect.set_defaults(action_run=_inspect)
    verify = commands.add_parser("verify", help="check every file of a folder of ours against its hash")
    verify.add_argument("path", type=Path, nargs="+")
    verify.set_defaults(action_run=_verify)
    diff = commands.add_parser(
        "diff", help="compare two checkpoints of any format; exit code 1 if they differ"
    )
    diff.add_argument("first", type=Path)
    diff.add_argument("second", type=Path)
    diff.add_argument("--limit", type=int, default=20, metavar="N", help="differences to list (default: 20)")
    diff.add_argument("--weights-only", action="store_true", help="do not compare optimizer state")
    diff.set_defaults(action_run=_diff)


def run(arguments: argparse.Namespace) -> int:
    """Runs the chosen one."""
    status: int = arguments.action_run(arguments)
    return status


def _inspect(arguments: argparse.Namespace) -> int:
    kind = formats.detect(arguments.path)
    print(f"{arguments.path}: {formats.FORMATS[kind]}")
    if kind == "neuron":
        _print_manifest(Checkpoint(arguments.path).manifest)
    contents = _read(arguments.path, weights_only=False, verify=False)
    _print_sizes(contents)
    _print_groups(contents)
    if arguments.all:
        rows = [(n, _short(e.dtype), _shape(e.shape)) for n, e in contents.tensors.items()]
        rows += [(alias, "tied to", name) for alias, name in contents.aliases.items()]
        _table(("tensor", "dtype", "shape"), sorted(rows))
    return 0


def _print_manifest(manifest: Manifest) -> None:
    layout = ", ".join(f"{axis}={size}" for axis, size in manifest.mesh.items() if size > 1)
    facts = {
        "step": "not given" if manifest.step is None else f"{manifest.step:,}",
        "epoch": "not given" if manifest.epoch is None else str(manifest.epoch),
        "form": manifest.state_dict_type,
        "written by": ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items())),
        "layout": layout or ("one rank" if manifest.mesh else "none (converted)"),
        "files": f"{len(manifest.files)}, {sum(f.size for f in manifest.files.values()) / 1e6:,.1f} MB",
    }
    for name, value in facts.items():
        print(f"{name + ':':12} {value}")


def _print_sizes(contents: Contents) -> None:
    kinds: dict[str, list[int]] = {}
    dtypes: dict[str, Counter[str]] = {}
    for name, entry in contents.tensors.items():
        kind, _, rest = name.partition("/")
        kind = (
            kind if kind == "model" else f"{kind} {rest.rpartition('/')[2]}" if "optimizer" in kind else kind
        )
        count = kinds.setdefault(kind, [0, 0, 0])
        count[0] += 1
        count[1] += entry.nbytes // entry.dtype.itemsize
        count[2] += entry.nbytes
        dtypes.setdefault(kind, Counter())[_short(entry.dtype)] += 1
    rows = [
        (kind, str(n), f"{numel:,}", f"{size / 1e6:,.1f}", ", ".join(sorted(dtypes[kind])))
        for kind, (n, numel, size) in sorted(kinds.items())
    ]
    _table(("what", "tensors", "elements", "MB", "dtype"), rows)
    if contents.aliases:
        print(
            f"{len(contents.aliases)} tied: " + ", ".join(f"{a} = {b}" for a, b in contents.aliases.items())
        )


def _print_groups(contents: Contents) -> None:
    for index, groups in enumerate(contents.groups):
        for number, group in enumerate(groups):
            options = ", ".join(
                f"{key}={value}"
                for key, value in group["options"].items()
                if isinstance(value, (int, float, tuple, list)) and not isinstance(value, bool)
            )
            print(f"optimizer {index}, group {number}: {len(group['params'])} parameters, {options}")


def _verify(arguments: argparse.Namespace) -> int:
    status = 0
    for path in arguments.path:
        try:
            if (
                not (commit.is_committed(path) or commit.is_committed(commit.replaced(path)))
                and path.exists()
            ):
                raise CheckpointError(
                    f"{path} is no folder of this package: other formats hold no hashes to check."
                )
            checkpoint = Checkpoint(path)
            checkpoint.check_listing()
            with show_transfer("Verifying", path) as progress:
                neuron.check_hashes(checkpoint, progress)
        except CheckpointError as error:
            print(f"{path}: DAMAGED: {error}")
            status = 1
        else:
            files = checkpoint.manifest.files
            print(f"{path}: intact ({len(files)} files, {sum(f.size for f in files.values()) / 1e6:,.1f} MB)")
    return status


def _diff(arguments: argparse.Namespace) -> int:
    first, second = (
        _read(p, weights_only=arguments.weights_only, verify=True)
        for p in (arguments.first, arguments.second)
    )
    with show_transfer("Comparing", f"{arguments.first} with {arguments.second}") as progress:
        found = differences(first, second, progress)
    if not found:
        print(f"equal: {len(first.tensors)} tensors, bit for bit")
        return 0
    shown = found[: arguments.limit]
    _table(("name", "difference", "largest"), [(d.name, d.what, _number(d)) for d in shown])
    print(
        f"{len(found)} differences"
        + (f", {len(found) - len(shown)} more than are shown (--limit N)" if len(found) > len(shown) else "")
    )
    return 1


def _number(difference: Difference) -> str:
    return "" if difference.largest is None else f"{difference.largest:.3g}"


def _read(path: Path, *, weights_only: bool, verify: bool) -> Contents:
    options = formats.ConvertOptions(
        target="neuron", rules=NXD_LLAMA, weights_only=weights_only, verify=verify
    )
    with show_transfer("Reading", path) as progress:
        contents = formats.read(path, options, progress)
    return contents.weights_only() if weights_only else contents


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, tuple("-" * width for width in widths), *rows):
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _shape(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape) or "scalar"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
