"""Compiles the simulated device; quick when it has been done before."""

from __future__ import annotations

import os
import shutil
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

SITE = Path(__file__).resolve().parent / "site"


def missing_compiler() -> str | None:
    """What is missing to compile with, or None."""
    compiler = os.environ.get("CXX", "c++")
    return None if shutil.which(compiler) else f"no C++ compiler ({compiler} is not on the path)"


def build() -> Path:
    """Compiles what is not compiled yet; returns the compiled file."""
    import torch.utils.cpp_extension as extension

    binary = _binary()
    if not binary.path().exists():
        binary.folder().mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        # PyTorch looks for ninja on the path, and an environment that is not activated is not on it.
        os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        print("sim: compiling the simulated neuron device (once, about a minute)…", flush=True)
        extension.load(
            binary.NAME,
            [str(path) for path in binary.SOURCES],
            build_directory=str(binary.folder()),
            extra_cflags=["-O1", "-std=c++20", "-Wall"],
        )
        print(f"sim: compiled in {time.monotonic() - started:.0f} s", flush=True)
    return binary.path()


def _binary() -> ModuleType:
    """Its module that knows where; not by way of the package, which wants to load what is only being made."""
    spec = spec_from_file_location("neuron_sim_binary", SITE / "neuron_sim" / "binary.py")
    if spec is None or spec.loader is None:
        raise ImportError(str(SITE))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
