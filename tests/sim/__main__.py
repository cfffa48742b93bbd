"""Runs tests on the simulated neuron device: ``python -m tests.sim [--share] [arguments of pytest]``.

A process of its own, because PyTorch looks for devices when it is imported. Where there is no C++ compiler nothing is
run, which is told in one line; that is a failure where ``CI`` is set.
"""

from __future__ import annotations

import os
import subprocess
import sys

from neuron_lightning.backends.select import ENVIRONMENT_VARIABLE
from tests.sim.build import SITE, build, missing_compiler

SUITES = ("tests/sim", "tests/dist", "tests/parity")
HOST_ONLY = (
    "tests/dist/test_examples.py",
    "tests/dist/test_failures.py",
    "tests/dist/test_launch.py",
    "tests/parity/test_huggingface.py",
)
"""Nothing in them runs on warm ranks, which have the device."""


def main(arguments: list[str]) -> int:
    """Builds the device and runs pytest with it; the exit code of pytest."""
    if reason := missing_compiler():
        print(f"sim: SKIPPED, {reason}: nothing is tested on the simulated neuron device", flush=True)
        return int(bool(os.environ.get("CI")))
    build()
    path = os.pathsep.join(filter(None, (str(SITE), os.environ.get("PYTHONPATH"))))
    options = ["--sim-share"] if "--share" in arguments else []
    rest = [argument for argument in arguments if argument != "--share"]
    if not any(argument.startswith("tests") for argument in rest):
        rest += [*SUITES, *(f"--ignore={path}" for path in HOST_ONLY)]
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "--timeout", "900", *options, *rest]
    # One process by itself computes on the host, as the reference; warm ranks are told to take the device.
    env = {**os.environ, "PYTHONPATH": path, ENVIRONMENT_VARIABLE: "cpu"}
    return subprocess.run(command, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
