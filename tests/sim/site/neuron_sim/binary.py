"""Where the compiled part is: one per version of its sources, of torch and of Python."""

from __future__ import annotations

import hashlib
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

NAME = "neuron_sim_C"
_SIM = Path(__file__).resolve().parents[2]
SOURCES = sorted((_SIM / "csrc").glob("*.cpp"))
_BUILDS = _SIM.parents[1] / "build" / "neuron_sim"


def folder() -> Path:
    """Where this version is, or will be."""
    digest = hashlib.sha256(f"{torch.__version__} {sys.version} {sys.platform}".encode())
    for path in sorted((_SIM / "csrc").iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return _BUILDS / digest.hexdigest()[:16]


def path() -> Path:
    """The compiled file."""
    return folder() / f"{NAME}.so"


def load() -> ModuleType:
    """The compiled module.

    Raises:
        ImportError: it has not been compiled.
    """
    if not path().exists():
        raise ImportError(f"the simulated neuron device is not built ({path()}): run `python -m tests.sim`.")
    spec = spec_from_file_location(NAME, path(), loader=ExtensionFileLoader(NAME, str(path())))
    if spec is None or spec.loader is None:
        raise ImportError(f"{path()} cannot be loaded")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return module
