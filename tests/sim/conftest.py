"""These tests are about the simulated device: collected only where a run has it."""

from __future__ import annotations

from tests.devices import is_simulated

collect_ignore_glob = [] if is_simulated() else ["test_*.py"]
