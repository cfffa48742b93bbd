"""From any known format to any other: detection, reading, renaming, writing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from neuron_lightning.checkpoint import commit
from neuron_lightning.checkpoint.formats import (
    dcp,
    dcp_metadata,
    lightning_file,
    neuron,
    nxd,
    nxd_files,
    nxd_write,
)
from neuron_lightning.checkpoint.formats import safetensor_formats as tensors
from neuron_lightning.checkpoint.formats.contents import Contents, Progress, silent
from neuron_lightning.checkpoint.formats.names import Rename, identity
from neuron_lightning.checkpoint.formats.nxd_layout import NxdLayout
from neuron_lightning.errors import CheckpointError

FORMATS = {
    "neuron": "a folder of this package",
    "hf": "a Hugging Face folder (weights)",
    "file": "one safetensors file (weights)",
    "dcp": "a folder of torch.distributed.checkpoint",
    "nxd": "a folder in NxD's layout",
    "lightning": "one Lightning .ckpt file",
}


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What a conversion needs to know besides source and target.

    Attributes:
        source, target: formats, keys of :data:`FORMATS`; ``source`` None: detected.
        rename: applied to the names of parameters on the way.
        rules: how parameters are cut and fused in NxD's layout, and fused in Lightning's files; see
            :class:`NxdLayout`.
        config: contents of ``config.json``; None: the source's, if it has one.
        dtype: of the written weights; None: as they are.
        weights_only: leave optimizer state out.
        verify: check the hashes of a folder of ours first.
        overwrite: replace what stands at the target.
        max_file_bytes: size at which another file is begun, where a format has several.
        tp, dp, zero1, xser, core: of the written NxD layout; see :class:`~.nxd_write.NxdWriting`.
        kv_multiplier: ranks that share a key-value head; None: from ``config``, or by comparing ranks.
        kv_order: ``tiled`` or ``blocked``.
        fuse_qkv: whether query, key and value are one parameter, where nothing tells.
        no_decay: words in names that exempt from weight decay, for files without names.
    """

    source: str | None = None
    target: str
    rename: Rename = identity
    rules: Mapping[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    dtype: torch.dtype | None = None
    weights_only: bool = False
    verify: bool = True
    overwrite: bool = False
    max_file_bytes: int = tensors.MAX_FILE_BYTES
    tp: int = 1
    dp: int = 1
    zero1: bool = False
    xser: bool = True
    core: bool = False
    kv_multiplier: int | None = None
    kv_order: str = "tiled"
    fuse_qkv: bool = True
    no_decay: Sequence[str] | None = None


def detect(path: Path) -> str:
    """The format of what is at ``path``.

    Raises:
        CheckpointError: nothing is there, or nothing that is known.
    """
    if commit.is_committed(path) or commit.is_committed(commit.replaced(path)):
        return "neuron"
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(9)
        return "file" if path.suffix == ".safetensors" or start[8:9] == b"{" else "lightning"
    if (path / dcp_metadata.METADATA).is_file():
        return "dcp"
    if (path / tensors.INDEX).is_file() or (path / tensors.SINGLE).is_file():
        return "hf"
    if nxd_files.is_nxd(path):
        return "nxd"
    if not path.exists():
        commit.locate(path)
    seen = sorted(entry.name for entry in path.iterdir())[:6]
    raise CheckpointError(
        f"{path} is no checkpoint of a known format (it holds {', '.join(seen) or 'nothing'}): say which by --from "
        f"({', '.join(FORMATS)})."
    )


def read(path: Path, options: ConvertOptions, progress: Progress = silent) -> Contents:
    """Describes the checkpoint at ``path``, under its own names.

    Raises:
        CheckpointError: no checkpoint of the format, damaged, or it holds code.
    """
    kind = options.source or detect(path)
    readers: dict[str, Callable[[], Contents]] = {
        "neuron": lambda: neuron.read(path, verify=options.verify, progress=progress),
        "hf": lambda: tensors.read_folder(path),
        "file": lambda: tensors.read_file(path),
        "dcp": lambda: dcp.read(path),
        "nxd": lambda: nxd.read(path, _reading(options)),
        "lightning": lambda: lightning_file.read(path, options.rules, options.no_decay),
    }
    if kind not in readers:
        raise CheckpointError(f"{kind!r} is no known format: use one of {', '.join(FORMATS)}.")
    contents = readers[kind]()
    if options.config is not None:
        contents.config = options.config
    return contents


def _reading(options: ConvertOptions) -> nxd.NxdReading:
    config = options.config or {}
    heads, size = config.get("num_attention_heads"), config.get("head_dim")
    if heads and not size and config.get("hidden_size"):
        size = config["hidden_size"] // heads
    return nxd.NxdReading(
        rules=options.rules,
        kv_order=options.kv_order,
        vocab_size=config.get("vocab_size"),
        kv_multiplier=options.kv_multiplier,
        no_decay=options.no_decay,
        query_rows=heads * size if heads and size else None,
        weights_only=options.weights_only,
    )


def convert(source: Path, target: Path, options: ConvertOptions, progress: Progress = silent) -> Contents:
    """Reads one format and writes another, a slice at a time.

    Returns:
        What was written.

    Raises:
        CheckpointError: as reading and writing; nothing is left at the target then.
    """
    contents = read(source, options, progress).renamed(options.rename)
    return finish(target, contents, options, progress)


def finish(
    target: Path, contents: Contents, options: ConvertOptions, progress: Progress = silent
) -> Contents:
    """The second half of :func:`convert`: cuts out what is not wanted, casts, writes. Returns what was written."""
    if options.weights_only:
        contents = contents.weights_only()
    if options.dtype is not None:
        contents = contents.cast(options.dtype)
    write(target, contents, options, progress)
    return contents


def write(target: Path, contents: Contents, options: ConvertOptions, progress: Progress = silent) -> None:
    """Writes ``contents`` in ``options.target``'s format. Raises :class:`CheckpointError`."""
    common: dict[str, Any] = {"overwrite": options.overwrite, "progress": progress}
    limit = options.max_file_bytes
    writers: dict[str, Callable[[], None]] = {
        "neuron": lambda: neuron.write(target, contents, max_file_bytes=limit, **common),
        "hf": lambda: tensors.write_folder(target, contents, max_file_bytes=limit, **common),
        "file": lambda: tensors.write_file(target, contents, **common),
        "dcp": lambda: dcp.write(target, contents, **common),
        "nxd": lambda: nxd_write.write(target, contents, _writing(contents, options), **common),
        "lightning": lambda: lightning_file.write(target, contents, fuse_qkv=options.fuse_qkv, **common),
    }
    if options.target not in writers:
        raise CheckpointError(f"{options.target!r} is no known format: use one of {', '.join(FORMATS)}.")
    if not contents.weights():
        raise CheckpointError("the source holds no weights: there is nothing to write.")
    try:
        writers[options.target]()
    except OSError as error:
        raise CheckpointError(
            f"could not write {target} ({error.strerror or error}): nothing is left of it; see to space and permissions."
        ) from error


def _writing(contents: Contents, options: ConvertOptions) -> nxd_write.NxdWriting:
    layout = NxdLayout(
        rules=options.rules,
        tp=options.tp,
        kv_multiplier=_multiplier(contents, options),
        kv_order=options.kv_order,
    )
    return nxd_write.NxdWriting(
        layout=layout,
        dp=options.dp,
        zero1=options.zero1,
        xser=options.xser,
        core=options.core,
        fuse_qkv=options.fuse_qkv,
    )


def _multiplier(contents: Contents, options: ConvertOptions) -> int:
    if options.kv_multiplier is not None:
        return options.kv_multiplier
    heads = (contents.config or {}).get("num_key_value_heads")
    if heads is None and options.tp > 1:
        if any(name.endswith(("weight_k", "k_proj.weight")) for name in contents.tensors):
            raise CheckpointError(
                "the number of key-value heads is not known: pass the model's config.json (--config), or how many ranks "
                "share a key-value head (--kv-size-multiplier; 1 if the heads suffice for all ranks)."
            )
        return 1
    return max(1, options.tp // heads) if heads else 1
