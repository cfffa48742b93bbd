"""The devices: which one this process runs on, and the one object that knows how.

``get_backend()`` returns the backend in use (choosing one on first use), ``select_backend`` makes the choice
explicitly. The rule, first match wins: ``NEURON_LIGHTNING_BACKEND``; a live ``neuron`` device; torch_xla with
a Neuron PJRT device; ``cuda``; ``cpu``.
"""

from __future__ import annotations

from neuron_lightning.backends.base import Backend
from neuron_lightning.backends.select import get_backend, select_backend, use_backend

__all__ = ["Backend", "get_backend", "select_backend", "use_backend"]
