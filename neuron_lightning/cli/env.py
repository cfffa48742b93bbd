"""``neuron-lightning env``: what there is for training on, which device would be used and why, and what is wrong."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from neuron_lightning.backends import Backend, select_backend
from neuron_lightning.backends.diagnose import diagnose
from neuron_lightning.backends.environment import DISTRIBUTIONS, MODULES, VARIABLES, Environment, collect
from neuron_lightning.lightning.launch import Launch, detect

HELP = "show versions, what there is of Neuron, the backend that would be chosen and why, and what is wrong"

_PACKAGES = (
    "neuron-lightning",
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "safetensors",
)


def run() -> int:
    """Prints the facts, one a line: what was found first, so that it is there when no backend can be chosen.

    Returns:
        The exit status: 1 if something is wrong that would stop a training run.
    """
    environment, launch = collect(), detect()
    _show(_versions() | _found(environment))
    backend, reason = select_backend()
    _show(_chosen(backend, reason, launch))
    local_ranks = launch.local_world_size if launch is not None else None
    findings = diagnose(environment, backend.name, local_ranks)
    for finding in findings:
        _show({"warning" if finding.error is None else "error": finding.message})
    if not findings:
        _show({"diagnosis": "nothing wrong was found"})
    return int(any(finding.error is not None for finding in findings))


def version_of(package: str) -> str:
    """The installed version, or that there is none (a source tree on the path is not installed)."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _versions() -> dict[str, str]:
    return {"python": f"{platform.python_version()} on {platform.platform()}"} | {
        name: version_of(name) for name in _PACKAGES
    }


def _found(environment: Environment) -> dict[str, str]:
    """What was found of Neuron; what is not there is not listed one by one."""
    packages = [
        f"{name} {environment.distributions[name]}"
        for name in DISTRIBUTIONS
        if name in environment.distributions
    ]
    device = (
        f"{environment.neuron_devices} live" if environment.knows_neuron else "not a device of this torch"
    )
    variables = {name: environment.variables[name] for name in VARIABLES if name in environment.variables}
    return {
        "instance": environment.instance_type or "not known to be one of EC2",
        "Neuron chips": f"{environment.device_nodes} under /dev",
        "neuron device": device,
        "Neuron packages": ", ".join(packages) or "none installed",
        "importable": ", ".join(name for name in MODULES if name in environment.modules)
        or f"none of {', '.join(MODULES)}",
        "set variables": ", ".join(f"{name}={value}" for name, value in variables.items()) or "none",
    }


def _chosen(backend: Backend, reason: str, launch: Launch | None) -> dict[str, str]:
    started = (
        "none (a plain process)"
        if launch is None
        else f"{launch.launcher}, rank {launch.rank} of {launch.world_size}"
    )
    return {
        "backend": f"{backend.name} ({reason})",
        "devices": str(backend.device_count()),
        "process group": backend.process_group_backend,
        "launcher": started,
    }


def _show(facts: Mapping[str, str]) -> None:
    for name, value in facts.items():
        print(f"{name + ':':18} {value}")
