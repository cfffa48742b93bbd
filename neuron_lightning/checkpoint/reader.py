"""Committed checkpoints: what they hold, and whether they still hold it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_lightning.checkpoint import boxes, commit, manifest, storage, transfer, typed_json
from neuron_lightning.checkpoint.boxes import Box
from neuron_lightning.checkpoint.exchange import Ranks
from neuron_lightning.checkpoint.manifest import TensorRecord
from neuron_lightning.checkpoint.plan import TRAINER_FILE
from neuron_lightning.checkpoint.tensor_file import Layout
from neuron_lightning.checkpoint.transfer import Want
from neuron_lightning.errors import CheckpointError

Progress = Callable[[str, int, int], None]


class Checkpoint:
    """A committed checkpoint with a manifest that matches its own digest.

    Args:
        path: the checkpoint's name, or its URL.

    Attributes:
        folder: its files.
        manifest: what they hold.

    Raises:
        CheckpointError: there is none, or its manifest is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = storage.place(path).open()
        self.manifest = manifest.read(self.folder)
        self._layouts: dict[str, Layout] = {}

    def files(self, kinds: Collection[str]) -> list[str]:
        """Names of the files of some kinds."""
        return [name for name, record in self.manifest.files.items() if record.kind in kinds]

    def file(self, base: str) -> str | None:
        """The name under which ``base`` is stored; None if it is not. (Object stores add the attempt's id.)"""
        return next((name for name in self.manifest.files if storage.base_name(name) == base), None)

    def check_listing(self) -> None:
        """Checks that the folder holds the files that the manifest lists, with their sizes, and no others."""
        for name, record in self.manifest.files.items():
            if (size := self.folder.size(name)) != record.size:
                raise transfer.damaged_size(self.folder.where(name), size, record.size)
        if extra := self.folder.strangers({commit.MANIFEST, *self.manifest.files}):
            raise CheckpointError(
                f"{self.folder} holds {extra[0]!r}, which its manifest does not list: move it away, or use another "
                "checkpoint."
            )

    def check_hash(self, name: str, on_bytes: Callable[[int], None] | None = None) -> None:
        """Checks one file against its hash. Raises :class:`CheckpointError`, naming it."""
        transfer.read(self.folder, self.manifest.files, [], [name], on_bytes or _uncounted, {})

    def wants(self, record: TensorRecord, box: Box, into: Tensor) -> list[Want]:
        """How to put the elements of ``box`` together in ``into``, a tensor of the same shape."""
        for stored in record.boxes:
            if stored.box == box:  # nothing was resharded
                return [Want(stored, record.dtype, boxes.whole(box.shape), into)] if box.numel else []
        plan, _ = boxes.cover(box, (stored.box for stored in record.boxes))
        found = []
        for index, common in plan:
            stored = record.boxes[index]
            view = boxes.view(into, common.within(box))
            found.append(Want(stored, record.dtype, common.within(stored.box), view))
        return found

    def read_box(self, record: TensorRecord, box: Box, into: Tensor) -> int:
        """Copies the elements of ``box`` into a tensor of the same shape, converting its dtype. Returns bytes read.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        wants = self.wants(record, box, into)
        transfer.read(self.folder, self.manifest.files, wants, [], _uncounted, self._layouts)
        return sum(want.size for want in wants)

    def read_tensor(self, name: str) -> Tensor:
        """A whole global tensor, on the CPU. Raises :class:`CheckpointError` if there is none of that name."""
        record = self.manifest.resolve(name)
        if record is None:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}.")
        tensor = torch.empty(record.shape, dtype=record.dtype, device="cpu")
        self.read_box(record, boxes.whole(record.shape), tensor)
        return tensor

    def read_document(self, base: str) -> Any:
        """The value stored as typed JSON in a file; the tensors that it refers to are verified too.

        Raises:
            CheckpointError: there is no such file, or it is damaged.
        """
        name = self.file(base)
        if name is None:
            raise CheckpointError(f"{self.folder} holds no {base}.")
        record = self.manifest.files[name]
        with self.folder.open(name) as reader:
            raw = reader.read(0, reader.size)
            where = reader.where
        if len(raw) != record.size or hashlib.new(record.algorithm, raw).hexdigest() != record.hash:
            raise CheckpointError(
                f"{where} does not match its hash in the manifest: the file is damaged; use another checkpoint."
            )
        beside = name.removesuffix(".json") + ".safetensors"
        if beside in self.manifest.files:
            self.check_hash(beside)
        try:
            return typed_json.decode(json.loads(raw.decode()), self.read_tensor)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where} is not the JSON that this package writes: {error}") from error

    def read_trainer(self) -> dict[str, Any]:
        """What rank 0 has written: ``trainer``, a mapping, and ``optimizers``, a list with the list of groups of each.

        A group is a mapping of ``params``, canonical names, and ``options``, the hyper-parameters by name.

        Raises:
            CheckpointError: there is no such file, it is damaged, or it has another structure.
        """
        document = self.read_document(TRAINER_FILE)
        if not _is_trainer_document(document):
            raise CheckpointError(
                f"{self.folder.where(TRAINER_FILE)} does not hold the state of a trainer and its optimizers: it is damaged; "
                "use another checkpoint."
            )
        return dict(document)


def _is_trainer_document(document: Any) -> bool:
    return (
        isinstance(document, dict)
        and isinstance(document.get("trainer"), dict)
        and isinstance(document.get("optimizers"), list)
        and all(isinstance(groups, list) and all(map(_is_group, groups)) for groups in document["optimizers"])
    )


def _is_group(group: Any) -> bool:
    return (
        isinstance(group, dict)
        and isinstance(params := group.get("params"), list)
        and all(isinstance(name, str) for name in params)
        and isinstance(options := group.get("options"), dict)
        and "params" not in options
    )


def load(
    path: str | Path,
    plan: Callable[[Checkpoint], Sequence[Want]],
    kinds: Iterable[str],
    what: str,
    ranks: Ranks,
    progress: Progress,
) -> None:
    """Copies what every rank wants; each file of some kinds is checked by the rank that reads most of it. Collective.

    Args:
        path: of the checkpoint.
        plan: what this rank wants of it; called once; may fail on one rank only.
        kinds: of files whose hashes are checked, whoever wants them; none to trust them.
        what: what is being done, for messages.
        ranks: who loads together.
        progress: called with the stage ``read``.

    Raises:
        CheckpointError: on all ranks; if a file is damaged, local tensors may be half changed.
    """
    kept: list[tuple[Checkpoint, Sequence[Want]]] = []
    kinds = tuple(kinds)

    def ask() -> dict[str, int]:
        checkpoint = Checkpoint(path)
        if ranks.rank == 0 and checkpoint.files(kinds):
            checkpoint.check_listing()
        wants = plan(checkpoint)
        kept.append((checkpoint, wants))
        sizes: dict[str, int] = {}
        for want in wants:
            sizes[want.stored.file] = sizes.get(want.stored.file, 0) + want.size
        return sizes

    wanted = ranks.together(what, ask)
    checkpoint, wants = kept[0]
    files, checked = checkpoint.manifest.files, checkpoint.files(kinds)
    mine = _share_out(checked, {name: files[name].size for name in checked}, wanted)[ranks.rank]
    total = sum(files[name].size for name in mine)
    total += sum(size for name, size in wanted[ranks.rank].items() if name not in mine)
    with _counted("read", total, progress) as count, torch.no_grad():
        ranks.together(what, lambda: transfer.read(checkpoint.folder, files, wants, mine, count, {}))


def verify(path: str | Path, kinds: Iterable[str], ranks: Ranks, progress: Progress) -> None:
    """Checks the folder's listing and the hashes of the files of some kinds, each file by one rank. Collective.

    Raises:
        CheckpointError: on all ranks, naming the first damaged file.
    """
    opened: list[Checkpoint] = []
    ranks.together(f"open the checkpoint {path}", lambda: opened.append(Checkpoint(path)))
    checkpoint = opened[0]
    files, names = checkpoint.manifest.files, checkpoint.files(tuple(kinds))
    sizes = {name: files[name].size for name in names}
    mine = _share_out(names, sizes, [{} for _ in range(ranks.size)])[ranks.rank]

    def work() -> None:
        if ranks.rank == 0:
            checkpoint.check_listing()
        with _counted("verify", sum(sizes[name] for name in mine), progress) as count:
            transfer.read(checkpoint.folder, files, [], mine, count, {})

    ranks.together(f"verify the checkpoint {checkpoint.folder}", work)


def _share_out(
    names: Iterable[str], sizes: dict[str, int], wanted: Sequence[dict[str, int]]
) -> list[list[str]]:
    """By rank, the files that it checks: so that all ranks read about the same number of bytes in all."""
    load = [sum(sizes_of_rank.values()) for sizes_of_rank in wanted]
    mine: list[list[str]] = [[] for _ in wanted]
    for name in sorted(names, key=lambda n: (-sizes[n], n)):
        more = [sizes[name] - wanted_by.get(name, 0) for wanted_by in wanted]
        rank = min(range(len(wanted)), key=lambda r: (load[r] + more[r], r))
        load[rank] += more[rank]
        mine[rank].append(name)
    return mine


@contextlib.contextmanager
def _counted(stage: str, total: int, progress: Progress) -> Any:
    """A counter of bytes that reports how far it is."""
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done = min(total, done + size)
        progress(stage, done, total)

    progress(stage, 0, total)
    yield count
    progress(stage, total, total)


def _uncounted(size: int) -> None:
    """Progress that nobody looks at."""
