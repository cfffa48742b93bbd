"""The accelerator that the Trainer sees when it runs on Neuron devices, and the name it is registered under."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry, CPUAccelerator, CUDAAccelerator

from neuron_lightning.backends import Backend, get_backend
from neuron_lightning.backends.native import NativeBackend
from neuron_lightning.errors import ConfigError

NAME = "neuron"
_DEVICE_TYPES = ("neuron", "xla")


class NeuronXLAAccelerator(Accelerator):
    """Neuron cores as Lightning's accelerator (``Trainer(accelerator="neuron")``).

    :class:`~neuron_lightning.NeuronXLAStrategy` puts it in place by itself on a machine with Neuron devices;
    naming it is only needed to insist on them.
    """

    def setup_device(self, device: torch.device) -> None:
        """Makes ``device`` the current one. Raises :class:`ConfigError` if it is not a Neuron device."""
        if device.type not in _DEVICE_TYPES:
            raise ConfigError(
                f"NeuronXLAAccelerator was given the device {str(device)!r}: it drives 'neuron' and 'xla' devices "
                "only; leave accelerator='auto', or name the accelerator of that device."
            )
        _backend().set_device(device)

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """Memory figures in bytes, for Lightning's DeviceStatsMonitor."""
        return _backend().memory_stats(torch.device(device))

    def teardown(self) -> None:
        """Returns cached device memory."""
        _backend().empty_cache()

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        """Device indices from a count, a list, or text such as ``"2"`` or ``"0,3"``; -1 is all of them."""
        if isinstance(devices, str):
            parts = [int(part) for part in devices.split(",") if part.strip()]
            devices = parts if "," in devices else parts[0]
        if isinstance(devices, Sequence):
            return list(devices)
        return list(range(_backend().device_count() if devices == -1 else int(devices)))

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """The devices of these indices."""
        return [_backend().device(index) for index in devices]

    @staticmethod
    def auto_device_count() -> int:
        """Number of Neuron devices that this process sees."""
        return _backend().device_count()

    @staticmethod
    def is_available() -> bool:
        """Whether there are Neuron cores that work, natively or through torch-xla."""
        return _backend().is_available()

    @staticmethod
    def name() -> str:
        """``neuron``."""
        return NAME


def _backend() -> Backend:
    """The backend in use if it drives Neuron cores, else the native one."""
    backend = get_backend()
    return backend if backend.device_type in _DEVICE_TYPES else NativeBackend(NAME)


def accelerator_for(backend: Backend) -> Accelerator:
    """The accelerator that drives a backend's devices."""
    if backend.name == "cpu":
        return CPUAccelerator()
    if backend.name == "cuda":
        return CUDAAccelerator()
    return NeuronXLAAccelerator()


def backend_name(accelerator: str | Accelerator) -> str | None:
    """The backend that a Trainer's ``accelerator=`` asks for; None for ``"auto"``.

    Raises:
        ConfigError: an accelerator that no backend drives.
    """
    names = {"auto": None, "cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "xla": "xla", NAME: NAME}
    name = accelerator if isinstance(accelerator, str) else accelerator.name()
    if name not in names:
        raise ConfigError(
            f"NeuronXLAStrategy cannot run on accelerator {name!r}: it runs on neuron, xla, cuda and cpu; "
            "leave accelerator='auto' or name one of these."
        )
    return names[name]


def register() -> None:
    """Registers the accelerator as ``"neuron"``, once."""
    if NAME not in AcceleratorRegistry:
        AcceleratorRegistry.register(NAME, NeuronXLAAccelerator, description="AWS Neuron cores")
