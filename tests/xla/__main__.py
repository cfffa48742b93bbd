"""Runs the suite on torch-xla: ``python -m tests.xla [--share] [arguments of pytest]``, in an environment that has it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

SUITES = ("tests/xla", "tests/dist/test_xm.py")


def main(arguments: list[str]) -> int:
    """Runs pytest; its exit code."""
    if importlib.util.find_spec("torch_xla") is None:
        print("xla: this Python has no torch_xla; use make test-xla", file=sys.stderr)
        return 1
    rest = [argument for argument in arguments if argument != "--share"]
    if "--share" in arguments:
        rest += ["-m", "not slow"]
    if not any(argument.startswith("tests") for argument in rest):
        rest += SUITES
    # One process by itself computes on the host, as the reference; ranks are told what they are.
    env = {**os.environ, "NEURON_LIGHTNING_BACKEND": "cpu", "NEURON_LIGHTNING_TEST_RANKS": "xla"}
    env.pop("PJRT_DEVICE", None)
    command = [sys.executable, "-m", "pytest", "--timeout", "900", *rest]
    return subprocess.run(command, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
