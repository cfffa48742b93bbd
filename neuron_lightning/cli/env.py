"""``neuron-lightning env``: which device training would use here and why, and the versions in play."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from neuron_lightning.backends import select_backend
from neuron_lightning.lightning.launch import detect

HELP = "show the backend that would be chosen and why, devices, launcher and versions"

_PACKAGES = (
    "neuron-lightning",
    "torch",
    "lightning",
    "torch-neuronx",
    "torch-xla",
    "transformers",
    "tokenizers",
    "safetensors",
)


def run() -> int:
    """Prints the facts, one a line."""
    backend, reason = select_backend()
    launch = detect()
    started = (
        "none (a plain process)"
        if launch is None
        else f"{launch.launcher}, rank {launch.rank} of {launch.world_size}"
    )
    facts = {
        "backend": f"{backend.name} ({reason})",
        "devices": str(backend.device_count()),
        "process group": backend.process_group_backend,
        "launcher": started,
        "python": f"{platform.python_version()} on {platform.platform()}",
    }
    facts |= {name: version_of(name) for name in _PACKAGES}
    for name, value in facts.items():
        print(f"{name + ':':18} {value}")
    return 0


def version_of(package: str) -> str:
    """The installed version, or that there is none (a source tree on the path is not installed)."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
