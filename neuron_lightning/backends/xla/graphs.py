"""How many graphs torch-xla has compiled and run, and what went to the host in between."""

from __future__ import annotations

from dataclasses import dataclass

import torch_xla
import torch_xla.debug.metrics as met
from torch import Tensor

_READ = "aten::_local_scalar_dense"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts since the process began; subtract two of them for those of a step.

    Attributes:
        compiled: graphs that were compiled.
        run: graphs that were started, compiled before or not.
        reads: scalars that the host asked for (``.item()``, ``bool(tensor)``).
        fallbacks: operators that ran on the host because XLA has none, without the reads.
        transfers: times that tensors were fetched, however many at a time.
    """

    compiled: int = 0
    run: int = 0
    reads: int = 0
    fallbacks: int = 0
    transfers: int = 0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(**{name: value - getattr(other, name) for name, value in vars(self).items()})


def counts() -> Counts:
    """The counts of this process."""
    uncached, cached = _counter("UncachedCompile"), _counter("CachedCompile")
    reads = _counter(_READ)
    aten = sum(_counter(name) for name in met.counter_names() if name.startswith("aten::"))
    transfers = met.metric_data("TransferFromDeviceTime")
    return Counts(
        compiled=uncached,
        run=uncached + cached,
        reads=reads,
        fallbacks=aten - reads,
        transfers=0 if transfers is None else int(transfers[0]),
    )


def graph_hash(tensors: list[Tensor]) -> str:
    """Hash of the pending graph that computes ``tensors``."""
    return str(torch_xla._XLAC._get_graph_hash(tensors).hex())


def graph_text(tensors: list[Tensor]) -> str:
    """The pending graph that computes ``tensors``, as HLO."""
    return str(torch_xla._XLAC._get_xla_tensors_hlo(tensors))


def _counter(name: str) -> int:
    return int(met.counter_value(name) or 0)
