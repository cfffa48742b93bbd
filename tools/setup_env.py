"""Makes the virtual environment that every `make` target runs in. Needs nothing but Python's standard library.

Usage: python3 tools/setup_env.py .venv

A torch of the machine's own accelerator comes from its vendor. If the Python that runs this script has one
with a live device, the environment is built on top of it and torch is left alone. Otherwise the pinned torch
is installed. A machine with Neuron devices but without such a torch stops here, with the line that installs
it, rather than train on the CPU without a word.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
OLDEST, NEWEST = (3, 10), (3, 14)

PROBE = """
import json, torch
live = torch.accelerator.is_available()
kind = torch.accelerator.current_accelerator().type if live else None
print(json.dumps([torch.__version__, kind, torch.accelerator.device_count() if live else 0]))
"""


def main(arguments: list[str]) -> int:
    """Builds the environment; returns the exit status."""
    if len(arguments) != 1:
        return stop(f"usage: {sys.executable} tools/setup_env.py FOLDER")
    version = sys.version_info[:2]
    if not OLDEST <= version <= NEWEST:
        return stop(
            f"Python 3.{OLDEST[1]} to 3.{NEWEST[1]} is needed, but {sys.executable} is {version[0]}.{version[1]}; "
            "name another one: make setup PYTHON=/path/to/python3"
        )
    folder = Path(arguments[0]).absolute()
    found = _torch_with_live_accelerator()
    neuron_devices = glob.glob("/dev/neuron*")
    if found is None and neuron_devices and not os.environ.get("IGNORE_NEURON"):
        return stop(
            f"this machine has Neuron devices ({len(neuron_devices)} under /dev), but {sys.executable} has no torch "
            "that can use them. Install TorchNeuron into it from the Neuron package index, as the Neuron setup "
            f"guide says for this instance type:\n    {sys.executable} -m pip install torch-neuronx\n"
            "or activate the environment of a Neuron machine image, and run make again. "
            "To train on this machine's CPU in spite of it: make setup IGNORE_NEURON=1"
        )
    return _build(folder, found)


def _build(folder: Path, found: tuple[str, str, int] | None) -> int:
    if found is None:
        print("setup: no torch with a live accelerator in this Python; installing the pinned set", flush=True)
    else:
        torch, kind, count = found
        print(f"setup: building on torch {torch} of {sys.executable} ({count} {kind} device(s))", flush=True)
    site = ["--system-site-packages"] if found else []
    if status := new_environment(folder, *site):
        return status
    if found and sys.prefix != sys.base_prefix:
        _see_through_to_this_environment(folder)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "on"]
    constraints = _constraints(folder, found[0] if found else None)
    if subprocess.run([*pip, "-c", str(constraints), "-e", f"{ROOT}[llama,dev]"]).returncode:
        return stop("installing failed; the lines above say why. Then run make again.")
    check = "import torch, lightning; print(f'setup: torch {torch.__version__}, lightning {lightning.__version__}')"
    return subprocess.run([str(python), "-c", check]).returncode


def new_environment(folder: Path, *options: str) -> int:
    """Makes an empty virtual environment in place of what is at ``folder``; returns the exit status."""
    shutil.rmtree(folder, ignore_errors=True)
    if subprocess.run([sys.executable, "-m", "venv", *options, str(folder)]).returncode:
        shutil.rmtree(folder, ignore_errors=True)
        return stop(
            f"{sys.executable} -m venv failed. Where ensurepip is missing (Debian, Ubuntu), install it once: "
            f"apt-get install python3.{sys.version_info[1]}-venv; or name a complete Python: make setup PYTHON=…"
        )
    return 0


def _torch_with_live_accelerator() -> tuple[str, str, int] | None:
    """(version, device type, devices) of this Python's torch, or None without one that has a device."""
    answer = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if answer.returncode:
        return None
    version, kind, count = json.loads(answer.stdout.splitlines()[-1])
    return (version, kind, count) if kind else None


def _see_through_to_this_environment(folder: Path) -> None:
    """--system-site-packages shows the base Python's packages; a virtual environment's need a .pth file."""
    (site,) = folder.glob("lib/python3*/site-packages")
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site / "_torch_of_this_machine.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")


def _constraints(folder: Path, torch: str | None) -> Path:
    """The pinned set; with a vendor's torch, that torch in place of the pinned one."""
    if torch is None:
        return CONSTRAINTS
    pins = re.sub(r"(?m)^torch==.*$", f"torch=={torch}", CONSTRAINTS.read_text(encoding="utf-8"))
    target = folder / "constraints.txt"
    target.write_text(pins, encoding="utf-8")
    return target


def stop(message: str) -> int:
    print(f"setup: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
