"""What a checkpoint holds, whatever its format: described at once, read a slice at a time.

A source returns a :class:`Contents` whose tensors are descriptions with a function that reads a box; a sink asks for
the boxes in the order in which it writes them. So a conversion needs memory for one slice, not for the model.

Names are those of a manifest: ``model/<name>``, ``average.<key>/<name>``, ``optimizer.<index>/<name>/<state key>``
(``master`` is the fp32 weight). They are canonical: global, unfused, unpadded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neuron_lightning.checkpoint.boxes import Box, cover, view, whole
from neuron_lightning.errors import CheckpointError

SLICE_BYTES = 1 << 20
"""What a sink asks for at once, at most."""

Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``, the latter two in bytes."""


@dataclass(frozen=True)
class Entry:
    """One global tensor.

    Attributes:
        dtype, shape: of the whole tensor.
        read: the elements of a box, on the CPU, with the box's shape.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[Box], Tensor]

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def full(self) -> Tensor:
        """The whole tensor."""
        return self.read(whole(self.shape))


@dataclass(kw_only=True)
class Contents:
    """A checkpoint.

    Attributes:
        tensors: by canonical name.
        aliases: name of a tied tensor to the name under which it is in ``tensors``.
        scalars: by ``optimizer.<index>/<name>`` the numbers of its state, such as ``{"step": 300.0}``.
        groups: by optimizer, its parameter groups: ``{"options": …, "params": [names]}``. The names are those of
            the module, so that a fused parameter is one name.
        trainer: everything else that a Trainer saves, without ``state_dict`` and ``optimizer_states``.
        config: the mapping of a ``config.json``, if the source has one.
    """

    tensors: dict[str, Entry]
    aliases: dict[str, str] = field(default_factory=dict)
    scalars: dict[str, dict[str, float]] = field(default_factory=dict)
    groups: list[list[dict[str, Any]]] = field(default_factory=list)
    trainer: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None

    def weights(self) -> dict[str, Entry]:
        """The tensors of the model, by name without prefix."""
        return {n.removeprefix("model/"): e for n, e in self.tensors.items() if n.startswith("model/")}

    def weight_aliases(self) -> dict[str, str]:
        """The tied names of the model, without prefix."""
        pairs = ((a.removeprefix("model/"), b.removeprefix("model/")) for a, b in self.aliases.items())
        return dict(pairs)

    def parameter_names(self) -> list[str]:
        """The names in the optimizers' groups: those of the module's parameters, fused ones too."""
        return [name for groups in self.groups for group in groups for name in group["params"]]

    def weights_only(self) -> Contents:
        """The same without optimizer state."""
        kept = {name: entry for name, entry in self.tensors.items() if not name.startswith("optimizer.")}
        return dataclasses.replace(self, tensors=kept, scalars={}, groups=[])

    def renamed(self, rename: Callable[[str], str]) -> Contents:
        """The same with ``rename`` applied to the names of parameters and buffers.

        Raises:
            CheckpointError: two names become one.
        """
        return dataclasses.replace(
            self,
            tensors=rename_keys(self.tensors, rename),
            aliases={rename_key(a, rename): rename_key(b, rename) for a, b in self.aliases.items()},
            scalars={rename_key(f"{k}/", rename).removesuffix("/"): v for k, v in self.scalars.items()},
            groups=[
                [{**group, "params": [rename(name) for name in group["params"]]} for group in groups]
                for groups in self.groups
            ],
        )

    def cast(self, dtype: torch.dtype) -> Contents:
        """The same with floating-point weights in another dtype; optimizer state stays as it is."""
        tensors = {
            name: cast_entry(entry, dtype) if _is_weight(name, entry) else entry
            for name, entry in self.tensors.items()
        }
        return dataclasses.replace(self, tensors=tensors)


def _is_weight(name: str, entry: Entry) -> bool:
    return not name.startswith("optimizer.") and entry.dtype.is_floating_point


def cast_entry(entry: Entry, dtype: torch.dtype) -> Entry:
    """The same tensor, converted to ``dtype`` as it is read."""
    return Entry(dtype, entry.shape, lambda box: entry.read(box).to(dtype))


def split_key(key: str) -> tuple[str, str, str]:
    """(prefix, name, suffix) of a tensor's name: ``("optimizer.0/", "a.weight", "/exp_avg")``."""
    head, slash, rest = key.partition("/")
    if not head.startswith("optimizer."):
        return head + slash, rest, ""
    name, last, state = rest.rpartition("/")
    return head + slash, name, last + state


def rename_key(key: str, rename: Callable[[str], str]) -> str:
    """``key`` with ``rename`` applied to the parameter's name in it."""
    prefix, name, suffix = split_key(key)
    return prefix + rename(name) + suffix


def rename_keys(tensors: Mapping[str, Entry], rename: Callable[[str], str]) -> dict[str, Entry]:
    """``tensors`` under new names. Raises :class:`CheckpointError` if two names become one."""
    renamed: dict[str, Entry] = {}
    origin: dict[str, str] = {}
    for key, entry in tensors.items():
        new = rename_key(key, rename)
        if new in renamed:
            raise CheckpointError(
                f"{origin[new]} and {key} would both be called {new}: change the rename rules so that names stay apart."
            )
        renamed[new], origin[new] = entry, key
    return renamed


def slices(shape: Sequence[int], itemsize: int, limit: int = SLICE_BYTES) -> Iterator[Box]:
    """Cuts a row-major tensor into boxes of at most ``limit`` bytes (one element at least), in storage order."""
    size = math.prod(shape) * itemsize
    if size <= limit or not shape:
        if size:
            yield whole(shape)
        return
    row = size // shape[0]
    if row > limit:
        for index in range(shape[0]):
            for box in slices(shape[1:], itemsize, limit):
                yield Box((index, *box.offset), (1, *box.shape))
        return
    step, rest = limit // row, (0,) * (len(shape) - 1)
    for start in range(0, shape[0], step):
        yield Box((start, *rest), (min(step, shape[0] - start), *shape[1:]))


def by_size(entries: Sequence[tuple[str, Entry]], limit: int) -> list[list[tuple[str, Entry]]]:
    """Deals entries out, in order, to files of at most ``limit`` bytes; a larger tensor has a file of its own."""
    files: list[list[tuple[str, Entry]]] = [[]]
    size = 0
    for key, entry in entries:
        if files[-1] and size + entry.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append((key, entry))
        size += entry.nbytes
    return files


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


class Counter:
    """Adds up the bytes of a stage and reports them."""

    def __init__(self, progress: Progress, stage: str, total: int) -> None:
        self._progress, self._stage, self._total, self._done = progress, stage, total, 0
        progress(stage, 0, total)

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress(self._stage, min(self._done, self._total), self._total)


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor, and how to read boxes of it.

    Attributes:
        box: in the global tensor.
        read: elements of a box that is counted from where the piece starts.
    """

    box: Box
    read: Callable[[Box], Tensor]


def assembled(name: str, dtype: torch.dtype, shape: tuple[int, ...], pieces: Sequence[Piece]) -> Entry:
    """A global tensor from the pieces that hold it.

    Raises:
        CheckpointError: when it is read, if no piece holds an element.
    """

    def read(box: Box) -> Tensor:
        plan, missing = cover(box, (piece.box for piece in pieces))
        if missing:
            raise CheckpointError(
                f"no file holds the elements of {name} from {missing[0].offset} on, shape {missing[0].shape}, of the "
                f"shape {shape}: the files do not fit together."
            )
        if len(plan) == 1:
            piece = pieces[plan[0][0]]
            return piece.read(box.within(piece.box))
        result = torch.empty(box.shape, dtype=dtype, device="cpu")
        for index, common in plan:
            view(result, common.within(box)).copy_(pieces[index].read(common.within(pieces[index].box)))
        return result

    return Entry(dtype, shape, read)


def equal(a: Entry, b: Entry) -> bool:
    """Whether two tensors are the same, bit for bit; read slice by slice."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    boxes = slices(a.shape, a.dtype.itemsize)
    return all(torch.equal(as_bytes(a.read(box)), as_bytes(b.read(box))) for box in boxes)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that nan equals nan and 0 does not equal -0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
