"""Which backend this process uses, and why (said once, in the log)."""

from __future__ import annotations

import importlib.util
import logging
import os

from neuron_lightning.backends.base import Backend
from neuron_lightning.backends.diagnose import check_environment
from neuron_lightning.backends.native import NativeBackend
from neuron_lightning.errors import ConfigError

_log = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "NEURON_LIGHTNING_BACKEND"
NAMES = ("neuron", "xla", "cuda", "cpu")


class _Holder:
    """The one holder of the backend in use."""

    backend: Backend | None = None
    reason: str = ""


def select_backend(requested: str | None = None) -> tuple[Backend, str]:
    """Chooses a backend and says why; does not make it current (see :func:`use_backend`).

    Args:
        requested: a name from an explicit ``Trainer(accelerator=…)``; beats detection.

    Returns:
        The backend and the reason for the choice.

    Raises:
        ConfigError: unknown name, a device that is not there, or a request that contradicts
            ``NEURON_LIGHTNING_BACKEND``.
    """
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE)
    if requested == "neuron" and _cores_are_xla(from_environment):
        requested = "xla"
    if requested and from_environment and requested != from_environment:
        raise ConfigError(
            f"the Trainer asks for accelerator {requested!r} but {ENVIRONMENT_VARIABLE}={from_environment!r}; "
            f"the two must agree: change one of them or unset {ENVIRONMENT_VARIABLE}."
        )
    if requested:
        return _named(requested), "asked for by the Trainer's accelerator"
    if from_environment:
        return _named(from_environment), f"{ENVIRONMENT_VARIABLE}={from_environment}"
    return _detect()


def _cores_are_xla(from_environment: str | None) -> bool:
    """Whether Neuron cores are reached through torch-xla here: somebody said so, or PJRT does."""
    if from_environment:
        return from_environment == "xla"
    return (
        importlib.util.find_spec("torch_xla") is not None
        and os.environ.get("PJRT_DEVICE", "").upper() == "NEURON"
        and not NativeBackend("neuron").is_available()
    )


def use_backend(backend: Backend, reason: str) -> None:
    """Makes ``backend`` the current one of this process and logs the choice, once."""
    if _Holder.backend is None or _Holder.backend.name != backend.name:
        _log.info("backend %s (%s)", backend.name, reason)
        _Holder.backend, _Holder.reason = backend, reason
        backend.adopt_process()


def get_backend() -> Backend:
    """The backend in use; chosen by :func:`select_backend` if nobody has chosen before."""
    if _Holder.backend is None:
        use_backend(*select_backend())
    backend = _Holder.backend
    if backend is None:
        raise ConfigError("no backend could be selected")
    return backend


def _named(name: str) -> Backend:
    if name not in NAMES:
        raise ConfigError(f"unknown backend {name!r}: it must be one of {', '.join(NAMES)}.")
    backend = _make(name)
    if not backend.is_available():
        raise ConfigError(
            f"backend {name!r} was asked for, but this machine has no working {name} device; "
            f"install its driver and its torch, or choose another of {', '.join(NAMES)}."
        )
    return backend


def _make(name: str) -> Backend:
    if name != "xla":
        return NativeBackend(name)
    if importlib.util.find_spec("torch_xla") is None:
        raise ConfigError(
            "backend 'xla' (trn1 and inf2) needs torch_xla, which is not installed: "
            "pip install 'neuron-lightning[xla]' into an environment with torch 2.9, "
            "or use 'neuron' on trn2 and trn3, 'cuda' or 'cpu'."
        )
    check_environment(name)  # before torch_xla is imported: it adapts the environment to what it finds
    from neuron_lightning.backends.xla import XLABackend

    return XLABackend()


def _detect() -> tuple[Backend, str]:
    neuron = NativeBackend("neuron")
    if neuron.is_available():
        return neuron, f"{neuron.device_count()} live neuron device(s)"
    if _cores_are_xla(None):
        return _make("xla"), "torch_xla is installed and PJRT_DEVICE=NEURON"
    cuda = NativeBackend("cuda")
    if cuda.is_available():
        return cuda, f"no neuron device; {cuda.device_count()} CUDA device(s)"
    return NativeBackend("cpu"), "no neuron, XLA or CUDA device found"
