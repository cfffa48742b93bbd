"""trn1 and inf2 through torch-xla: the only place of the package that imports it.

Everything here is imported when the backend is chosen, and not before. With PJRT's CPU device it runs anywhere
torch-xla is installed, which is what the tests do; ``docs/xla.md`` says what that can show and what it cannot.
"""

from __future__ import annotations

from neuron_lightning.backends.xla.backend import XLABackend

__all__ = ["XLABackend"]
