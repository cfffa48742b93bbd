"""A LightningDataModule around a function that makes a loader for one data-parallel rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from neuron_lightning.errors import ConfigError, DataError
from neuron_lightning.lightning.internals import SHARDED_LOADER
from neuron_lightning.parallel import mesh


class NeuronLightningDataModule(LightningDataModule):
    """Calls ``dataloader_fn(data_dir, batch_size, dp_size, dp_rank, *data_args, **data_kwargs)`` on every rank.

    The function must return a loader over this data-parallel rank's samples only; ranks of one tensor-parallel
    group call it with equal arguments and must get equal batches. Lightning never wraps such a loader again.

    Args:
        dataloader_fn: makes the training loader.
        data_dir: handed through.
        batch_size: samples per micro-batch and replica, handed through.
        data_args: further positional arguments.
        data_kwargs: further keyword arguments.
        val_dataloader_fn: makes the validation loader in the same way; None: no validation.

    Raises:
        ConfigError: an argument of the wrong kind.
    """

    def __init__(
        self,
        dataloader_fn: Callable[..., Any],
        data_dir: Any,
        batch_size: int,
        data_args: Sequence[Any] = (),
        data_kwargs: Mapping[str, Any] | None = None,
        val_dataloader_fn: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        if not callable(dataloader_fn):
            raise ConfigError(f"dataloader_fn must be callable, not {type(dataloader_fn).__name__}.")
        if isinstance(data_args, str) or not isinstance(data_args, Sequence):
            raise ConfigError(
                f"data_args must be a tuple of arguments, not {data_args!r}; write ({data_args!r},)."
            )
        self.dataloader_fn = dataloader_fn
        self.val_dataloader_fn = val_dataloader_fn
        self.data_dir = data_dir
        self.batch_size = batch_size
        self.data_args = tuple(data_args)
        self.data_kwargs = dict(data_kwargs or {})

    def train_dataloader(self) -> Any:
        """This data-parallel rank's training loader."""
        return self._make(self.dataloader_fn)

    def val_dataloader(self) -> Any:
        """This data-parallel rank's validation loader; none without ``val_dataloader_fn``."""
        return [] if self.val_dataloader_fn is None else self._make(self.val_dataloader_fn)

    def _make(self, function: Callable[..., Any]) -> Any:
        layout = mesh.current()
        loader = function(
            self.data_dir,
            self.batch_size,
            layout.sizes["dp"],
            layout.coordinates["dp"],
            *self.data_args,
            **self.data_kwargs,
        )
        if not hasattr(loader, "__iter__"):
            name = getattr(function, "__qualname__", repr(function))
            raise DataError(f"{name} must return a data loader, not {type(loader).__name__}.")
        if isinstance(loader, DataLoader):
            setattr(loader, SHARDED_LOADER, True)
        return loader
