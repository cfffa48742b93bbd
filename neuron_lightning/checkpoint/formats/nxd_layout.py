"""NxD's layout as arithmetic: which rank's file holds which box of which canonical tensor.

Ranks of the tensor-parallel group hold equal blocks of rows (column-parallel layers, vocabulary) or of columns
(row-parallel ones). With ``m`` ranks for each key-value head NxD *tiles*: rank ``r`` holds key-value block
``r mod (tp / m)``, and so that its query heads meet that block, query block ``(r mod (tp/m)) * m + r // (tp/m)``;
the output projection's columns follow the queries. (Layers of ours keep the queries in order instead.) On trn2 it
repeats in place: block ``r // m``, queries in order. Fused parameters hold their parts below one another, each cut
by itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from neuron_lightning.checkpoint.boxes import Box, Placement
from neuron_lightning.errors import CheckpointError

KV_ORDERS = ("tiled", "blocked")
KINDS = ("whole", "rows", "columns", "vocab", "rows q", "rows kv", "columns q", "rows 2", "rows 3", "qkv")


@dataclass(frozen=True, kw_only=True)
class NxdLayout:
    """How a checkpoint in NxD's layout is cut.

    Attributes:
        rules: regular expression on a parameter's name in the module to how it is cut, one of :data:`KINDS`; the
            first that matches counts.
        tp: tensor-parallel size.
        kv_multiplier: m, ranks that share a key-value head.
        kv_order: ``tiled`` (trn1) or ``blocked`` (trn2).
        vocab_size: rows of vocabulary without padding; None: as stored.
    """

    rules: Mapping[str, str]
    tp: int = 1
    kv_multiplier: int = 1
    kv_order: str = "tiled"
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if bad := {kind for kind in self.rules.values() if kind not in KINDS}:
            raise CheckpointError(
                f"{sorted(bad)[0]!r} is no way to cut a parameter: use one of {', '.join(KINDS)}."
            )
        if self.kv_order not in KV_ORDERS:
            raise CheckpointError(f"kv_order {self.kv_order!r} must be one of {', '.join(KV_ORDERS)}.")
        if self.kv_multiplier < 1 or self.tp % self.kv_multiplier:
            raise CheckpointError(
                f"kv_size_multiplier {self.kv_multiplier} does not divide the tensor-parallel size {self.tp}: it is the "
                "number of ranks that share a key-value head."
            )

    def kind(self, name: str) -> str:
        """How the parameter is cut. Raises :class:`CheckpointError` if no rule says it."""
        for pattern, kind in self.rules.items():
            if re.fullmatch(pattern, name):
                return kind
        if self.tp == 1:
            return "whole"
        raise CheckpointError(
            f"no rule says how {name} is cut over {self.tp} ranks: NxD's files do not tell. Pass a plan (--plan FILE), a "
            f'JSON object of regular expressions to one of {", ".join(KINDS)}, such as {{"{re.escape(name)}": "rows"}}.'
        )

    def blocks(self, order: str) -> int:
        """Different blocks of a tensor."""
        return self.tp // self.kv_multiplier if order == "kv" else self.tp

    def block(self, order: str, rank: int) -> int:
        """Which block of a tensor a tensor-parallel rank holds."""
        m, blocks = self.kv_multiplier, self.tp // self.kv_multiplier
        if self.kv_order == "blocked":
            return rank // m if order == "kv" else rank
        if order == "kv":
            return rank % blocks
        return (rank % blocks) * m + rank // blocks if order == "q" else rank


@dataclass(frozen=True)
class Part:
    """A canonical tensor within a local parameter.

    Attributes:
        name: canonical.
        dim: dimension that is cut; None: every rank holds all.
        order: which block a rank has: ``""`` its own, ``q`` or ``kv``.
        start, size: where it stands in the local parameter along ``dim``.
        limit: extent of the global tensor along ``dim``; what is beyond is padding. None: nothing is.
    """

    name: str
    dim: int | None
    order: str
    start: int
    size: int
    limit: int | None = None


def parts_of(layout: NxdLayout, name: str, shape: Sequence[int], query_rows: int | None) -> list[Part]:
    """The canonical tensors in a local parameter.

    Args:
        layout: the cut.
        name: of the parameter.
        shape: local.
        query_rows: local rows of the queries, for a fused query-key-value parameter.

    Raises:
        CheckpointError: its rows cannot be divided among its parts.
    """
    kind = layout.kind(name)
    how, _, order = kind.partition(" ")
    if kind == "qkv":
        return _qkv(name, shape[0], query_rows)
    if how == "rows" and order.isdigit():
        number = int(order)
        if shape[0] % number:
            raise CheckpointError(
                f"{name} has {shape[0]} rows on a rank, which {number} fused parts cannot share."
            )
        size = shape[0] // number
        return [Part(f"{name}_{i}", 0, "", i * size, size) for i in range(number)]
    if how == "whole" or not shape:
        return [Part(name, None, "", 0, 0)]
    dim = 1 if how == "columns" else 0
    if dim >= len(shape):
        return [Part(name, None, "", 0, 0)]
    return [Part(name, dim, order, 0, shape[dim], limit=layout.vocab_size if how == "vocab" else None)]


def _qkv(name: str, rows: int, query_rows: int | None) -> list[Part]:
    if query_rows is None or not 0 < query_rows < rows or (rows - query_rows) % 2:
        raise CheckpointError(
            f"{name} fuses query, key and value in {rows} rows a rank, of which {query_rows} for queries cannot be: pass "
            "the model's config.json (--config)."
        )
    size = (rows - query_rows) // 2
    stem = name.removesuffix("_qkv")
    return [
        Part(f"{stem}_q", 0, "q", 0, query_rows),
        Part(f"{stem}_k", 0, "kv", query_rows, size),
        Part(f"{stem}_v", 0, "kv", query_rows + size, size),
    ]


def placement(layout: NxdLayout, part: Part, shape: Sequence[int], rank: int) -> Placement:
    """Where the elements of a part on a rank stand in the global tensor; its padding is left out."""
    offset, local_offset, extent, total = [0] * len(shape), [0] * len(shape), list(shape), list(shape)
    if part.dim is not None:
        total[part.dim] = part.size * layout.blocks(part.order)
        if part.limit is not None:
            total[part.dim] = min(total[part.dim], part.limit)
        start = min(part.size * layout.block(part.order, rank), total[part.dim])
        offset[part.dim], local_offset[part.dim] = start, part.start
        extent[part.dim] = min(part.size, total[part.dim] - start)
    box = Box(tuple(offset), tuple(extent))
    return Placement(part.name, tuple(total), box, Box(tuple(local_offset), tuple(extent)))
