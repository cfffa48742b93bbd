"""How many graphs torch-xla has compiled and run, and what went to the host in between."""

from __future__ import annotations

import torch_xla
import torch_xla.debug.metrics as met
from torch import Tensor

from neuron_lightning.backends.counts import Counts

_READ = "aten::_local_scalar_dense"


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


def graph_text(tensors: list[Tensor]) -> str:
    """The pending graph that computes ``tensors``, as HLO."""
    return str(torch_xla._XLAC._get_xla_tensors_hlo(tensors))


def _counter(name: str) -> int:
    return int(met.counter_value(name) or 0)
