"""The save protocol after planning: prepare, write, gather, commit.

1. Rank 0 removes what an interrupted save left and makes room for the new files.
2. Each rank writes its share there, hashing while it writes, and makes it durable.
3. Hashes and errors are gathered; an error on one rank is the same error on all, and nothing is left behind.
4. Rank 0 writes the manifest, makes it durable, gives the checkpoint its name and makes that durable.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from neuron_lightning.checkpoint import boxes, manifest, output, points, tensor_file, typed_json
from neuron_lightning.checkpoint.collector import uncollected
from neuron_lightning.checkpoint.exchange import Ranks
from neuron_lightning.checkpoint.manifest import FileRecord, Manifest, StoredBox, TensorRecord
from neuron_lightning.checkpoint.output import HashedFile
from neuron_lightning.checkpoint.plan import Document, FilePlan, Request, Share
from neuron_lightning.checkpoint.storage import Place
from neuron_lightning.errors import CheckpointError

Progress = Callable[[str, int, int], None]
Data = Callable[[FilePlan], Iterable[tuple[memoryview, bool]]]
"""The bytes of a file's tensors, in order, each with whether that memory stays as it is until all is written."""


@dataclass
class Written:
    """What one rank has written."""

    files: dict[str, FileRecord] = field(default_factory=dict)
    stored: list[tuple[str, StoredBox]] = field(default_factory=list)
    facts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    scalars: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def live_data(share: Share) -> Data:
    """The data as it is in the tensors now; they must not change until it is written."""
    views = {file.name: tensors for file, tensors in zip(share.files, share.views, strict=True)}

    def data(file: FilePlan) -> Iterator[tuple[memoryview, bool]]:
        for tensor in views[file.name]:
            stays = tensor_file.is_host_bytes(tensor)
            yield from ((piece, stays) for piece in tensor_file.host_pieces(tensor))

    return data


def write(
    request: Request,
    share: Share,
    data: Data,
    place: Place,
    ranks: Ranks,
    progress: Progress,
    on_commit: Callable[[], None] | None = None,
) -> None:
    """Writes and commits a planned checkpoint. Collective. Raises :class:`CheckpointError` on all ranks.

    ``on_commit`` is called on rank 0 right after the commit; every rank gives one, or none does.
    """
    what = f"save the checkpoint {place.name}"
    progress("prepare", 0, 0)
    attempt = ranks.together(what, lambda: place.prepare() if ranks.rank == 0 else "")[0]
    try:
        written = ranks.together(what, lambda: _Writer(place, attempt, progress).write(share, data))
        points.reach("gathered")
        progress("manifest", 0, 0)
        ranks.together(
            what, lambda: _commit(request, written, place, attempt, progress) if ranks.rank == 0 else None
        )
    except CheckpointError:
        if ranks.rank == 0:
            place.discard(attempt)
        raise
    if on_commit is None:
        return
    follow = f"carry out what follows the commit of {place.name} (it is committed)"
    ranks.together(follow, lambda: on_commit() if ranks.rank == 0 else None)


class _Writer:
    """Writes the files of one rank."""

    def __init__(self, place: Place, attempt: str, progress: Progress) -> None:
        self._place = place
        self._attempt = attempt
        self._progress = progress
        self._done = 0
        self._written = Written()

    def write(self, share: Share, data: Data) -> Written:
        """Writes all of a share durably; the disk works on one file while the next one is being written."""
        written = self._written
        written.aliases, written.scalars = share.aliases, share.scalars
        written.facts = dict(share.facts)
        self._progress("write", 0, share.size)
        with contextlib.ExitStack() as stack:
            opened = []
            for plan in share.files:
                name = self._place.file_name(plan.name, self._attempt)
                file = self._open(stack, name, share.size)
                file.write(plan.layout.header, stays=True)
                for piece, stays in data(plan):
                    file.write(piece, stays=stays)
                file.flush()
                opened.append((name, plan.kind, file))
                written.stored += [(item.name, StoredBox(name, item.key, item.box)) for item in plan.items]
            for document in share.documents:
                opened += self._document(stack, document)
            points.reach("share_written")
            for _, _, file in opened:
                file.start_hash()
            for name, kind, file in opened:
                written.files[name] = FileRecord(kind, *_swapped(file.finish()))
        self._place.sync(self._attempt)
        points.reach("share_synced")
        return written

    def _open(self, stack: contextlib.ExitStack, name: str, total: int | None = None) -> HashedFile:
        def count(size: int) -> None:
            if total is not None:
                self._done = min(total, self._done + size)
                self._progress("write", self._done, total)

        file = stack.enter_context(HashedFile(self._place.create(name, self._attempt), count))
        if total is not None:
            points.reach("share_opened")
        return file

    def _document(self, stack: contextlib.ExitStack, document: Document) -> list[tuple[str, str, HashedFile]]:
        """Writes typed JSON, and beside it the tensors that it refers to."""
        name = self._place.file_name(document.name, self._attempt)
        file = self._open(stack, name)
        file.write(document.text)
        opened = [(name, document.kind, file)]
        if document.tensors:
            beside = name.removesuffix(".json") + ".safetensors"
            file = self._open(stack, beside)
            layout = tensor_file.Layout.of((k, t.dtype, t.shape) for k, t in document.tensors.items())
            file.write(layout.header)
            for entry in layout.entries:
                for piece in tensor_file.host_pieces(document.tensors[entry.key]):
                    file.write(piece)
                self._written.facts[entry.key] = (entry.dtype, entry.shape)
                if entry.size:
                    box = StoredBox(beside, entry.key, boxes.whole(entry.shape))
                    self._written.stored.append((entry.key, box))
            opened.append((beside, document.kind, file))
        return opened


def _swapped(finished: tuple[int, str]) -> tuple[int, str, str]:
    return finished[0], output.ALGORITHM, finished[1]


@uncollected
def _commit(
    request: Request, written: Sequence[Written], place: Place, attempt: str, progress: Progress
) -> None:
    """Rank 0: the manifest and the new name."""
    complete = _merge(request, written)
    complete.check_cover(allow_overlap=request.state_dict_type == "sharded")
    for name, record in complete.files.items():
        if (size := place.written_size(name, attempt)) != record.size:
            raise CheckpointError(
                f"{name} of {place.name} has {size} bytes, but {record.size} were written to it."
            )
    progress("commit", 0, 0)
    place.publish(manifest.serialise(complete), attempt)


def _merge(request: Request, shares: Sequence[Written]) -> Manifest:
    facts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    stored: dict[str, list[StoredBox]] = defaultdict(list)
    scalars: dict[str, Mapping[str, float]] = {}
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
            if typed_json.encode(dict(known)) != typed_json.encode(dict(numbers)):
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
