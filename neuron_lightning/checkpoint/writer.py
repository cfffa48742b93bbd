"""The save protocol: agree, write, gather, commit.

1. All ranks agree on target and step; rank 0 removes what an interrupted save left and makes ``<target>.tmp``.
2. Each rank writes its share there, hashing while it writes, and makes it durable.
3. Hashes and errors are gathered; an error on one rank is the same error on all, and nothing is left behind.
4. Rank 0 writes the manifest, makes it durable, gives the folder its name and makes that durable.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_lightning.checkpoint import boxes, commit, manifest, points, tensor_file, typed_json
from neuron_lightning.checkpoint.boxes import Box, Holding
from neuron_lightning.checkpoint.exchange import Ranks
from neuron_lightning.checkpoint.manifest import FileRecord, Manifest, StoredBox, TensorRecord
from neuron_lightning.checkpoint.state import LocalState, Source
from neuron_lightning.errors import CheckpointError

Progress = Callable[[str, int, int], None]
STATE_DICT_TYPES = ("deduped", "sharded")
TRAINER_FILE = "trainer.json"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one rank wants in the checkpoint.

    Attributes:
        target: the folder to create.
        describe: makes the local state; may fail on one rank only.
        trainer: rank 0's is written.
        rank: state of this rank alone, or None.
        step, epoch, data: copied into the manifest.
        mesh: ranks by axis.
        state_dict_type: ``deduped`` or ``sharded``.
    """

    target: Path
    describe: Callable[[], LocalState]
    trainer: Mapping[str, Any]
    rank: Mapping[str, Any] | None
    step: int | None
    epoch: int | None
    data: Any
    mesh: Mapping[str, int]
    state_dict_type: str


@dataclass
class _Share:
    """What one rank has written."""

    files: dict[str, FileRecord] = field(default_factory=dict)
    stored: list[tuple[str, StoredBox]] = field(default_factory=list)
    facts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    scalars: dict[str, dict[str, float]] = field(default_factory=dict)


def file_name(rank: int, kind: str, ending: str) -> str:
    """``rank-00003.model.safetensors`` and the like."""
    return f"rank-{rank:05d}.{kind}.{ending}"


def write(request: Request, ranks: Ranks, progress: Progress) -> None:
    """Writes and commits a checkpoint. Collective. Raises :class:`CheckpointError` on all ranks."""
    target, what = request.target, f"save the checkpoint {request.target}"
    progress("prepare", 0, 0)
    _agree(request, ranks)
    ranks.together(what, lambda: commit.prepare(target) if ranks.rank == 0 else None)
    try:
        local, held = _describe(request, ranks, what)
        shares = ranks.together(what, lambda: _write_share(request, local, held, ranks, progress))
        points.reach("gathered")
        progress("manifest", 0, 0)
        ranks.together(what, lambda: _finish(request, shares, progress) if ranks.rank == 0 else None)
    except CheckpointError:
        if ranks.rank == 0:
            commit.discard(target)
        raise


def _agree(request: Request, ranks: Ranks) -> None:
    if request.state_dict_type not in STATE_DICT_TYPES:
        raise CheckpointError(
            f"state_dict_type must be one of {', '.join(STATE_DICT_TYPES)}, not {request.state_dict_type!r}."
        )
    plans = ranks.gather((str(request.target), request.step, request.state_dict_type))
    for rank, plan in enumerate(plans):
        if plan != plans[0]:
            raise CheckpointError(
                f"the ranks do not save the same checkpoint: (path, step, state_dict_type) is {plans[0]} on rank 0 and "
                f"{plan} on rank {rank}; every rank must call the save together, with equal arguments."
            )


def _describe(request: Request, ranks: Ranks, what: str) -> tuple[LocalState, list[list[Holding]]]:
    """This rank's state, and by rank what each holds (only its own where nothing is deduplicated)."""
    kept: list[LocalState] = []

    def work() -> list[Holding]:
        kept.append(request.describe())
        return [source.holding for source in kept[0].sources] if request.state_dict_type == "deduped" else []

    held = ranks.together(what, work)
    return kept[0], held


def _write_share(
    request: Request,
    local: LocalState,
    held: Sequence[Sequence[Holding]],
    ranks: Ranks,
    progress: Progress,
) -> _Share:
    rank = ranks.rank
    if not (folder := commit.temporary(request.target)).is_dir():
        raise CheckpointError(
            f"{folder}, which rank 0 made, is not there: a checkpoint needs a file system that all ranks share."
        )
    share = _Share(aliases=local.aliases, scalars=local.scalars)
    share.facts = {s.name: (s.tensor.dtype, s.global_shape) for s in local.sources}
    if request.state_dict_type == "deduped":
        mine = boxes.assign(held)[rank]
    else:
        mine = [(source.name, source.box) for source in local.sources if source.box.numel]
    pieces = _cut(local.sources, mine)
    total = sum(t.numel() * t.element_size() for items in pieces.values() for _, _, t in items)
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress("write", min(done, total), total)

    progress("write", 0, total)
    for kind, items in sorted(pieces.items()):
        name = file_name(rank, kind, "safetensors")
        keyed = _keys(items)
        record = tensor_file.write_tensors(folder / name, [(key, t) for key, _, _, t in keyed], count)
        share.files[name] = _record(kind, record)
        share.stored += [(tensor, StoredBox(name, key, box)) for key, tensor, box, _ in keyed]
    if rank == 0:
        _write_document(share, folder, request.trainer, "trainer", "trainer", TRAINER_FILE)
    if request.rank is not None:
        state_file = file_name(rank, "state", "json")
        _write_document(share, folder, request.rank, "rank", f"rank.{rank}", state_file)
    points.reach("share_written")
    commit.sync_folder(folder)
    points.reach("share_synced")
    return share


def _cut(
    sources: Sequence[Source], mine: Sequence[tuple[str, Box]]
) -> dict[str, list[tuple[str, Box, Tensor]]]:
    """By kind of file, the (name, box, data) that this rank writes."""
    by_name: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        by_name[source.name].append(source)
    found: dict[str, list[tuple[str, Box, Tensor]]] = defaultdict(list)
    for name, box in mine:
        source = next(s for s in by_name[name] if boxes.intersect(s.box, box) == box)
        found[source.kind].append((name, box, boxes.view(source.tensor, box.within(source.box))))
    return found


def _keys(items: Sequence[tuple[str, Box, Tensor]]) -> list[tuple[str, str, Box, Tensor]]:
    """Adds the key within the file: the tensor's name, numbered from the second box on."""
    seen: dict[str, int] = defaultdict(int)
    keyed = []
    for name, box, tensor in items:
        key = f"{name}#{seen[name]}" if seen[name] else name
        seen[name] += 1
        keyed.append((key, name, box, tensor))
    return keyed


def _write_document(share: _Share, folder: Path, value: Any, kind: str, prefix: str, name: str) -> None:
    """Writes typed JSON, and beside it the tensors that it refers to."""
    data, tensors = typed_json.encode(value, where=f"{kind} state", tensor_prefix=prefix)
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
    share.files[name] = _record(kind, tensor_file.write_bytes(folder / name, text))
    if tensors:
        beside = name.removesuffix(".json") + ".safetensors"
        share.files[beside] = _record(kind, tensor_file.write_tensors(folder / beside, list(tensors.items())))
        for key, tensor in tensors.items():
            shape = tuple(tensor.shape)
            share.facts[key] = (tensor.dtype, shape)
            if tensor.numel():
                share.stored.append((key, StoredBox(beside, key, boxes.whole(shape))))


def _record(kind: str, written: tuple[int, str]) -> FileRecord:
    return FileRecord(kind, written[0], tensor_file.ALGORITHM, written[1])


def _finish(request: Request, shares: Sequence[_Share], progress: Progress) -> None:
    """Rank 0: the manifest and the new name."""
    folder = commit.temporary(request.target)
    complete = _merge(request, shares)
    complete.check_cover(allow_overlap=request.state_dict_type == "sharded")
    for name, record in complete.files.items():
        if (size := tensor_file.require_regular(folder / name)) != record.size:
            raise CheckpointError(f"{folder / name} has {size} bytes, but {record.size} were written to it.")
    tensor_file.write_bytes(folder / commit.MANIFEST, manifest.serialise(complete))
    points.reach("manifest_written")
    progress("commit", 0, 0)
    commit.publish(request.target)


def _merge(request: Request, shares: Sequence[_Share]) -> Manifest:
    facts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    stored: dict[str, list[StoredBox]] = defaultdict(list)
    scalars: dict[str, dict[str, float]] = {}
    for rank, share in enumerate(shares):
        for name, fact in share.facts.items():
            if facts.setdefault(name, fact) != fact:
                raise CheckpointError(
                    f"{name} is {facts[name][0]} {facts[name][1]} on one rank and {fact[0]} {fact[1]} on rank {rank}: "
                    "all ranks must hold parts of the same global tensor."
                )
        for name, box in share.stored:
            stored[name].append(box)
        for owner, numbers in share.scalars.items():
            known = scalars.setdefault(owner, numbers)
            if typed_json.encode(known) != typed_json.encode(numbers):
                raise CheckpointError(
                    f"the optimizer state of {owner} is {known} on one rank and {numbers} on rank {rank}: the ranks have "
                    "made different numbers of steps; such a state cannot be resumed."
                )
    return Manifest(
        step=request.step,
        epoch=request.epoch,
        state_dict_type=request.state_dict_type,
        mesh=request.mesh,
        versions=manifest.versions(),
        data=request.data,
        files={name: record for share in shares for name, record in share.files.items()},
        tensors={n: TensorRecord(dtype, shape, tuple(stored[n])) for n, (dtype, shape) in facts.items()},
        aliases={name: target for share in shares for name, target in share.aliases.items()},
        scalars={owner: numbers for owner, numbers in scalars.items() if numbers},
    )
