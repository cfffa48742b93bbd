"""Makes the virtual environment of `make test-xla`: torch 2.9 with torch-xla on PJRT's CPU device.

Usage: python3 tools/setup_xla.py .venv-xla

torch-xla 2.9, the last release that trained on Neuron cores, has wheels for Python 3.10 to 3.13. The package index has
torch 2.9 with CUDA's libraries only (7 GB on disk); nothing here needs a GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from setup_env import CONSTRAINTS, ROOT, new_environment, stop

OLDEST, NEWEST = (3, 10), (3, 13)
VERSIONS = ("torch==2.9.0", "torch_xla==2.9.0")
_OTHERS = re.compile(r"(?i)^(torch|nvidia[\w-]*|triton|setuptools|fsspec|filelock|sympy|networkx)==")
"""Pins of the other environment's torch and of what torch itself pins."""


def main(arguments: list[str]) -> int:
    """Builds the environment; returns the exit status."""
    if len(arguments) != 1:
        return stop(f"usage: {sys.executable} tools/setup_xla.py FOLDER")
    version = sys.version_info[:2]
    if not OLDEST <= version <= NEWEST:
        return stop(
            f"torch-xla 2.9 has wheels for Python 3.{OLDEST[1]} to 3.{NEWEST[1]}, but {sys.executable} is "
            f"{version[0]}.{version[1]}; name another one: make test-xla XLA_PYTHON=/path/to/python3"
        )
    folder = Path(arguments[0]).absolute()
    if status := new_environment(folder):
        return status
    pins = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    constraints = folder / "constraints.txt"
    constraints.write_text(
        "\n".join(line for line in pins if not _OTHERS.match(line)) + "\n", encoding="utf-8"
    )
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "-c", str(constraints)]
    if subprocess.run([*pip, *VERSIONS, "-e", f"{ROOT}[llama,test]"]).returncode:
        return stop("installing failed; the lines above say why. Then run make test-xla again.")
    check = "import torch, torch_xla; print(f'setup: torch {torch.__version__}, torch_xla {torch_xla.__version__}')"
    return subprocess.run([python, "-c", check]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
