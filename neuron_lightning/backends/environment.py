"""What this machine has for reaching Neuron cores, found without touching them.

torch_xla is looked for and never imported: under torchrun its import alone rewrites ``NEURON_RT_VISIBLE_CORES``.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from neuron_lightning.backends.native import NativeBackend
from neuron_lightning.backends.visible_cores import (
    LOCAL_RANKS,
    NUM_CORES,
    NUM_RANKS,
    PROCESS_INDEX,
    VISIBLE_CORES,
)

BACKEND_VARIABLE = "NEURON_LIGHTNING_BACKEND"
PJRT_DEVICE = "PJRT_DEVICE"
VARIABLES = (BACKEND_VARIABLE, PJRT_DEVICE, VISIBLE_CORES, NUM_CORES, PROCESS_INDEX, NUM_RANKS, *LOCAL_RANKS)
MODULES = ("torch_xla", "libneuronxla", "torch_neuronx", "neuronx_distributed")
DISTRIBUTIONS = ("torch-neuronx", "torch-xla", "libneuronxla", "neuronx-cc", "neuronx-distributed")
_XLA_ONLY_FAMILIES = ("trn1", "trn1n", "inf2")
_MACHINE = Path("/sys/devices/virtual/dmi/id")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What was found on a machine; made by :func:`collect`, or by hand in tests.

    Attributes:
        variables: those of :data:`VARIABLES` that are set.
        distributions: those of :data:`DISTRIBUTIONS` that are installed, with their versions.
        modules: those of :data:`MODULES` that can be imported.
        torch_version: ``torch.__version__``.
        knows_neuron: whether torch has a device type ``neuron``, which is TorchNeuron at work.
        neuron_devices: live devices of that type.
        instance_type: the EC2 instance type, e.g. ``trn1.32xlarge``; None elsewhere.
        device_nodes: number of ``/dev/neuron*``, one per chip.
    """

    variables: Mapping[str, str]
    distributions: Mapping[str, str]
    modules: frozenset[str]
    torch_version: str
    knows_neuron: bool = False
    neuron_devices: int = 0
    instance_type: str | None = None
    device_nodes: int = 0

    @property
    def missing_for_xla(self) -> list[str]:
        """The modules without which torch-xla has no Neuron cores."""
        return [name for name in ("torch_xla", "libneuronxla") if name not in self.modules]

    @property
    def is_xla_only(self) -> bool:
        """Whether this instance's cores are reached through torch-xla alone."""
        return (self.instance_type or "").partition(".")[0] in _XLA_ONLY_FAMILIES


def collect() -> Environment:
    """Looks at this process and machine: no network, no device work, no import of torch_xla."""
    return Environment(
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        distributions={name: found for name in DISTRIBUTIONS if (found := _version(name))},
        modules=frozenset(name for name in MODULES if _is_importable(name)),
        torch_version=torch.__version__,
        knows_neuron=hasattr(torch, "neuron"),
        neuron_devices=NativeBackend("neuron").device_count(),
        instance_type=instance_type(),
        device_nodes=len(glob.glob("/dev/neuron[0-9]*")),
    )


def instance_type(folder: Path = _MACHINE) -> str | None:
    """The EC2 instance type as the firmware tells it; None on other machines and where it is hidden."""
    for name in ("product_name", "product_version"):
        try:
            text = (folder / name).read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            continue
        if re.fullmatch(r"[a-z][a-z0-9-]*\.[a-z0-9-]+", text):
            return text
    return None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _is_importable(name: str) -> bool:
    return sys.modules.get(name) is not None or importlib.util.find_spec(name) is not None
