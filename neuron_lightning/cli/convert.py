"""``neuron-lightning convert`` and ``merge``: a checkpoint of one format as one of another."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from neuron_lightning.checkpoint.formats import convert as formats
from neuron_lightning.checkpoint.formats import names
from neuron_lightning.checkpoint.formats import safetensor_formats as tensors
from neuron_lightning.checkpoint.formats.contents import Contents
from neuron_lightning.checkpoint.formats.nxd_layout import KINDS, KV_ORDERS
from neuron_lightning.errors import CheckpointError
from neuron_lightning.lightning.checkpoint_io import show_transfer
from neuron_lightning.models.llama_hf import from_hf_name, to_hf_name
from neuron_lightning.models.llama_nxd import NXD_LLAMA

HELP = "convert a checkpoint between formats (ours, Hugging Face, one file, DCP, NxD, Lightning)"
MERGE_HELP = "merge a checkpoint into one file: .safetensors (weights) or .ckpt (Lightning, resumable)"
_SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``convert``."""
    parser.description = (
        "Formats: " + "; ".join(f"{name}: {text}" for name, text in formats.FORMATS.items()) + "."
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="the checkpoint")
    parser.add_argument("target", type=Path, metavar="DST", help="what is to be written")
    parser.add_argument(
        "--from", dest="source_format", choices=formats.FORMATS, help="format of SRC (default: detected)"
    )
    parser.add_argument(
        "--to", dest="target_format", choices=formats.FORMATS, required=True, help="format of DST"
    )
    _add_common(parser)
    parser.add_argument(
        "--max-file-size",
        type=_bytes,
        default=tensors.MAX_FILE_BYTES,
        metavar="N[K|M|G]",
        help="begin another file at this size (default: 5G)",
    )
    nxd = parser.add_argument_group("NxD's layout")
    nxd.add_argument("--tp", type=int, default=1, help="tensor-parallel size of DST")
    nxd.add_argument("--dp", type=int, default=1, help="data-parallel size of DST, with --zero1")
    nxd.add_argument("--zero1", action="store_true", help="shard the optimizer state of DST over --dp ranks")
    nxd.add_argument(
        "--no-xser", dest="xser", action="store_false", help="one file a rank instead of one a tensor"
    )
    nxd.add_argument(
        "--core",
        action="store_true",
        help="the folder of neuronx_distributed.save_checkpoint (DST is DIR/TAG) instead of NxD Lightning's",
    )
    nxd.add_argument(
        "--kv-size-multiplier",
        type=int,
        metavar="M",
        help="ranks that share a key-value head (default: from --config, or found by comparing the ranks)",
    )
    nxd.add_argument(
        "--kv-order",
        choices=KV_ORDERS,
        default="tiled",
        help="order of repeated key-value heads: tiled (trn1, default), blocked (trn2)",
    )
    nxd.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help=f"JSON object: regular expression on a parameter's name to how it is cut ({', '.join(KINDS)}), ahead of the rules for Llama",
    )


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``merge``."""
    parser.add_argument("source", type=Path, metavar="SRC", help="the checkpoint, of any format")
    parser.add_argument("target", type=Path, metavar="DST", help="a .safetensors or .ckpt file")
    parser.add_argument(
        "--from", dest="source_format", choices=formats.FORMATS, help="format of SRC (default: detected)"
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights-only", action="store_true", help="leave the optimizer's state out")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the written weights (default: as they are)")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="config.json of the model, or a folder with one"
    )
    parser.add_argument(
        "--names",
        choices=("auto", "llama", "keep"),
        default="auto",
        help="auto: a Llama's names are Hugging Face's in a Hugging Face folder and ours elsewhere",
    )
    parser.add_argument(
        "--prefix",
        metavar="TEXT",
        help="what ours puts before the model's names (the attribute that holds it, such as 'model.'): taken off for Hugging Face (default: found), put on from it (default: nothing)",
    )
    parser.add_argument(
        "--map",
        type=Path,
        metavar="FILE",
        help="JSON object of rename rules, regular expression to replacement, applied last",
    )
    parser.add_argument(
        "--separate-qkv",
        dest="fuse_qkv",
        action="store_false",
        help="query, key and value are parameters of their own (GQAQKVColumnParallelLinear(fuse_qkv=False)); where an optimizer's groups tell, they count",
    )
    parser.add_argument(
        "--no-decay",
        nargs="+",
        metavar="WORD",
        help="words in names that exempt from weight decay, for optimizer state without names",
    )
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not check hashes first")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at DST")


def run(arguments: argparse.Namespace) -> int:
    """Converts, and says what came out."""
    source: Path = arguments.source
    source_format = arguments.source_format or formats.detect(source)
    options = formats.ConvertOptions(
        source=source_format,
        target=arguments.target_format,
        rules={**_plan(arguments.plan), **NXD_LLAMA},
        config=None if arguments.config is None else tensors.read_config(arguments.config),
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
        weights_only=arguments.weights_only,
        verify=arguments.verify,
        overwrite=arguments.overwrite,
        max_file_bytes=arguments.max_file_size,
        tp=arguments.tp,
        dp=arguments.dp,
        zero1=arguments.zero1,
        xser=arguments.xser,
        core=arguments.core,
        kv_multiplier=arguments.kv_size_multiplier,
        kv_order=arguments.kv_order,
        fuse_qkv=arguments.fuse_qkv,
        no_decay=arguments.no_decay,
    )
    with show_transfer("Converting", source) as progress:
        contents = formats.read(source, options, progress)
        contents = contents.renamed(_rename(arguments, source_format, contents))
        written = formats.finish(arguments.target, contents, options, progress)
    print(_summary(arguments.target, arguments.target_format, written))
    return 0


def run_merge(arguments: argparse.Namespace) -> int:
    """``merge``: as ``convert``, to the format that the ending of DST names."""
    endings = {".safetensors": "file", ".ckpt": "lightning"}
    if arguments.target.suffix not in endings:
        raise CheckpointError(f"{arguments.target} must end in .safetensors (weights) or .ckpt (Lightning).")
    defaults = argparse.ArgumentParser()
    add_arguments(defaults)
    target_format = endings[arguments.target.suffix]
    complete = defaults.parse_args([str(arguments.source), str(arguments.target), "--to", target_format])
    vars(complete).update({k: v for k, v in vars(arguments).items() if k != "run"})
    return run(complete)


def _rename(arguments: argparse.Namespace, source_format: str, contents: Contents) -> names.Rename:
    """Between names of ours and Hugging Face's, and the user's own rules."""
    target_format = arguments.target_format
    steps: list[names.Rename] = []
    llama = arguments.names == "llama" or (arguments.names == "auto" and _is_llama(contents.weights()))
    if (source_format == "hf") != (target_format == "hf") and llama:
        prefix = arguments.prefix
        if target_format == "hf":
            steps += [
                names.strip_prefix(_prefix(contents.weights()) if prefix is None else prefix),
                to_hf_name,
            ]
        else:
            steps += [from_hf_name, names.add_prefix(prefix or "")]
    elif arguments.prefix:
        add = source_format == "hf"
        steps.append(names.add_prefix(arguments.prefix) if add else names.strip_prefix(arguments.prefix))
    if arguments.map is not None:
        steps.append(names.read_rules(arguments.map))
    return names.chained(*steps)


def _is_llama(weights: Mapping[str, Any]) -> bool:
    return any(re.search(r"(^|\.)model\.layers\.\d+\.self_attn\.", name) for name in weights)


def _prefix(weights: Mapping[str, Any]) -> str:
    """What stands before the names of a Llama: of ``model.model.layers.0.…`` the first ``model.``."""
    return next((m[1] for n in weights if (m := re.fullmatch(r"((?:.*?\.)??)model\.layers\.\d+\..*", n))), "")


def _plan(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(plan, dict) or not all(isinstance(v, str) for v in plan.values()):
        raise CheckpointError(f"{path} must hold one JSON object of regular expressions to ways to cut.")
    return plan


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)B?", text.upper())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write a number and K, M or G, such as 5G.")
    return int(match[1]) * _SIZES[match[2]]


def _summary(target: Path, kind: str, contents: Contents) -> str:
    weights = contents.weights()
    size = sum(entry.nbytes for entry in contents.tensors.values())
    numel = sum(entry.nbytes // entry.dtype.itemsize for entry in weights.values())
    state = (
        "with optimizer state"
        if any(n.startswith("optimizer.") for n in contents.tensors)
        else "weights only"
    )
    if kind in ("hf", "file") and state != "weights only":
        state, size = "weights only", sum(entry.nbytes for entry in weights.values())
    lines = [
        f"{target}: {formats.FORMATS[kind]}, {len(weights)} tensors, {numel:,} elements, {size / 1e6:,.1f} MB, {state}"
    ]
    if kind == "hf" and contents.config is None:
        lines.append(
            "no config.json was written, since the source has none: pass --config FILE for transformers."
        )
    return "\n".join(lines)
