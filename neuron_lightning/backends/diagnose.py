"""What is wrong with this machine's set-up for a backend, said before any device time is spent.

:func:`~neuron_lightning.backends.environment.collect` looks, :func:`diagnose` judges what was found and touches
nothing, :func:`check_environment` does both and raises.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from neuron_lightning.backends.environment import BACKEND_VARIABLE, PJRT_DEVICE, Environment, collect
from neuron_lightning.backends.visible_cores import local_rank, number_of_ranks, refusal
from neuron_lightning.errors import ConfigError, LaunchError, NeuronLightningError

_log = logging.getLogger(__name__)

PJRT_DEVICES = ("NEURON", "CPU")
"""Values of ``PJRT_DEVICE`` that the xla backend drives, in the spelling that torch_xla wants."""
OLDEST_TORCH, NEWEST_TORCH = (2, 9), (2, 13)
"""The range of torch in setup.py: first and last minor version."""
XLA_TORCH = (2, 9)
"""The last torch that Neuron supports through torch-xla, and the only one that the xla backend is written for."""
_XLA_SET = "torch 2.9, torch-xla 2.9 and torch-neuronx 2.9 (it brings libneuronxla) of Neuron 2.31 or older"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong: an error of this class, or a warning where there is none."""

    message: str
    error: type[NeuronLightningError] | None = None


def check_environment(backend_name: str, local_ranks: int | None = None, *, requested: bool = False) -> None:
    """:func:`collect` and :func:`check` in one."""
    check(collect(), backend_name, local_ranks, requested=requested)


def check(
    environment: Environment, backend_name: str, local_ranks: int | None = None, *, requested: bool = False
) -> None:
    """Raises the first error that :func:`diagnose` finds; logs warnings, once per node.

    Raises:
        ConfigError: a set-up in which the backend cannot work, or would silently not be the one that was meant.
        LaunchError: the visible cores do not fit the number of ranks.
    """
    findings = diagnose(environment, backend_name, local_ranks, requested=requested)
    if not local_rank(environment.variables):
        for finding in findings:
            if finding.error is None:
                _log.warning("%s", finding.message)
    for finding in findings:
        if finding.error is not None:
            raise finding.error(finding.message)


def diagnose(
    environment: Environment, backend_name: str, local_ranks: int | None = None, *, requested: bool = False
) -> list[Finding]:
    """All that is wrong, what is to be mended first coming first.

    Args:
        environment: what was found.
        backend_name: the backend that is about to be used.
        local_ranks: processes on this node; None where that is not known yet: torchrun's ``LOCAL_WORLD_SIZE`` is
            taken, and without it the number of cores is not judged.
        requested: whether the Trainer's accelerator named the backend.
    """
    named = requested or bool(environment.variables.get(BACKEND_VARIABLE))
    findings = (
        _pjrt_device(environment, backend_name, named),
        _instance(environment, backend_name, named),
        _two_products(environment, backend_name, requested),
        _torch_version(environment, backend_name),
        _cores(environment, backend_name, local_ranks),
        _idle_devices(environment, backend_name, named),
    )
    return [finding for finding in findings if finding is not None]


def _pjrt_device(environment: Environment, backend_name: str, named: bool) -> Finding | None:
    value = environment.variables.get(PJRT_DEVICE)
    if not value:
        return None
    if value not in PJRT_DEVICES:
        return Finding(
            error=ConfigError,
            message=f"{PJRT_DEVICE}={value!r} is not a device that this package drives: it must be 'NEURON' (the "
            "cores of trn1 and inf2) or 'CPU' (torch-xla without them), in capitals; correct it, or unset "
            f"{PJRT_DEVICE}.",
        )
    missing = environment.missing_for_xla
    if value != "NEURON" or not missing:
        return None
    ignored = backend_name == "neuron" or (named and backend_name != "xla")
    consequence = (
        f"it has no effect on backend {backend_name!r}" if ignored else "no Neuron core can be reached"
    )
    return Finding(
        error=None if ignored else ConfigError,
        message=f"{PJRT_DEVICE}=NEURON means Neuron cores through torch-xla and its plugin libneuronxla, but "
        f"{' and '.join(missing)} cannot be imported, so {consequence}. Unset {PJRT_DEVICE}, or, on trn1 and "
        f"inf2, install {_XLA_SET}.",
    )


def _instance(environment: Environment, backend_name: str, named: bool) -> Finding | None:
    elsewhere = backend_name == "xla" or (named and backend_name != "neuron")
    if not (environment.is_xla_only and environment.knows_neuron) or elsewhere:
        return None
    return Finding(
        error=ConfigError,
        message=f"the device 'neuron' of torch {environment.torch_version} is TorchNeuron's, which supports trn2 "
        f"and trn3 only, and this is a {environment.instance_type}: its cores are reached through torch-xla. "
        f"Make an environment without TorchNeuron, with {_XLA_SET}, and set {PJRT_DEVICE}=NEURON; or start a "
        "trn2 or trn3 instance.",
    )


def _two_products(environment: Environment, backend_name: str, requested: bool) -> Finding | None:
    if not environment.knows_neuron or environment.missing_for_xla or backend_name not in ("neuron", "xla"):
        return None
    versions = environment.distributions
    products = (
        "two Neuron products are installed at once: TorchNeuron (backend 'neuron': torch "
        f"{environment.torch_version} has a device of that name, {environment.neuron_devices} live) and "
        f"PyTorch/XLA (backend 'xla': torch-xla {versions.get('torch-xla', 'of unknown version')} with libneuronxla "
        f"{versions.get('libneuronxla', 'of unknown version')}). Both come as torch-neuronx (here "
        f"{versions.get('torch-neuronx', 'of unknown version')}), of which an environment holds one"
    )
    remedy = f"Keep them in two environments: TorchNeuron for trn2 and trn3; {_XLA_SET} for trn1 and inf2"
    reason = _reason(environment, backend_name, requested)
    if reason is None:
        return Finding(
            error=ConfigError,
            message=f"{products}, and nothing says which is meant. {remedy}. Or say which: "
            f"{BACKEND_VARIABLE}=neuron or {BACKEND_VARIABLE}=xla.",
        )
    return Finding(message=f"{products}. Backend {backend_name!r} is used: {reason}. {remedy}.")


def _reason(environment: Environment, backend_name: str, requested: bool) -> str | None:
    """Why this one of two products is used; None if nobody said."""
    backend, pjrt = (environment.variables.get(name) for name in (BACKEND_VARIABLE, PJRT_DEVICE))
    if backend:
        return f"{BACKEND_VARIABLE}={backend} says so"
    if requested:
        return "the Trainer's accelerator asks for it"
    if pjrt and backend_name == "neuron":
        return f"live devices come before {PJRT_DEVICE}={pjrt}; {BACKEND_VARIABLE}=xla would take the other"
    return f"{PJRT_DEVICE}={pjrt} says so" if pjrt else None


def _torch_version(environment: Environment, backend_name: str) -> Finding | None:
    torch_release = _release(environment.torch_version)
    if backend_name != "xla":
        if OLDEST_TORCH <= torch_release <= NEWEST_TORCH:
            return None
        return Finding(
            message=f"this package is made for torch {_dotted(OLDEST_TORCH)} to {_dotted(NEWEST_TORCH)}, and "
            f"this is torch {environment.torch_version}: install one of these if something is amiss.",
        )
    xla = environment.distributions.get("torch-xla", environment.torch_version)
    if torch_release == XLA_TORCH == _release(xla):
        return None
    return Finding(
        error=ConfigError,
        message=f"backend 'xla' needs torch {_dotted(XLA_TORCH)} and torch-xla of the same version, the last one "
        f"that Neuron supports through XLA; here are torch {environment.torch_version} and torch-xla "
        f"{environment.distributions.get('torch-xla', 'not installed')}. Make an environment with {_XLA_SET}; or "
        "use backend 'neuron' on trn2 and trn3, 'cuda' or 'cpu' with this torch.",
    )


def _cores(environment: Environment, backend_name: str, local_ranks: int | None) -> Finding | None:
    on_host = backend_name == "xla" and environment.variables.get(PJRT_DEVICE) == "CPU"
    if backend_name not in ("neuron", "xla") or on_host:
        return None
    ranks = number_of_ranks(environment.variables) if local_ranks is None else local_ranks
    try:
        message = refusal(environment.variables, ranks, core_per_rank=backend_name == "neuron")
    except ConfigError as error:
        return Finding(error=ConfigError, message=str(error))
    return None if message is None else Finding(error=LaunchError, message=message)


def _idle_devices(environment: Environment, backend_name: str, named: bool) -> Finding | None:
    if not environment.device_nodes or backend_name not in ("cpu", "cuda") or named:
        return None
    through_xla = f"set {PJRT_DEVICE}=NEURON" if not environment.missing_for_xla else f"install {_XLA_SET}"
    return Finding(
        message=f"this machine has {environment.device_nodes} Neuron chip(s) under /dev, but torch "
        f"{environment.torch_version} does not see them, and {backend_name} is used. On trn2 and trn3 install "
        f"TorchNeuron; on trn1 and inf2 {through_xla}. {BACKEND_VARIABLE}={backend_name} says that it is meant so.",
    )


def _release(text: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"
