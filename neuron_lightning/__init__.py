"""PyTorch Lightning for AWS Trainium and Inferentia.

Public names are resolved when they are first used; importing the package registers the strategy and the
accelerator as ``"neuron"`` in Lightning's registries.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

_HOMES = {
    "AsyncSave": "config",
    "NeuronCheckpointIO": "lightning.checkpoint_io",
    "NeuronLTModule": "lightning.module",
    "NeuronLightningDataModule": "lightning.datamodule",
    "NeuronModelCheckpoint": "lightning.callbacks.model_checkpoint",
    "NeuronTQDMProgressBar": "lightning.progress",
    "NeuronTensorBoardLogger": "lightning.loggers",
    "NeuronXLAAccelerator": "lightning.accelerator",
    "NeuronXLAPrecisionPlugin": "lightning.precision",
    "NeuronXLAStrategy": "lightning.strategy",
    "RecompileGuard": "lightning.callbacks.recompile_guard",
    "finalize_checkpoint": "compat.checkpoint",
    "has_checkpoint": "compat.checkpoint",
    "initialize_parallel_model": "lightning.model",
    "initialize_parallel_optimizer": "optim",
    "load_checkpoint": "compat.checkpoint",
    "load_from_checkpoint": "lightning.load",
    "load_weights": "lightning.load",
    "neuronx_distributed_config": "config",
    "save_checkpoint": "compat.checkpoint",
}
_MODULES = {"parallel_state": "parallel.parallel_state", "xm": "compat.xm"}

__all__ = sorted([*_HOMES, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = import_module(f"{__name__}.{_MODULES[name]}")
    elif name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if find_spec("lightning") is not None:
    import_module(f"{__name__}.lightning.registration").register()
