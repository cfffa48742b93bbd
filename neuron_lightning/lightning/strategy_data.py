"""Loaders and batches: who reads which samples, where a resumed epoch goes on, and ids that fit the vocabulary."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from neuron_lightning.backends import get_backend
from neuron_lightning.errors import DataError
from neuron_lightning.lightning import data_position, drift, internals_loops
from neuron_lightning.models.attention_mask import mark_unpadded
from neuron_lightning.parallel import mesh

_IGNORED_LABEL = -100
_ID_KEYS = {"input_ids": None, "labels": _IGNORED_LABEL}
"""Batch entries that hold token ids, and the value outside the vocabulary that is allowed there."""


class DataMixin(ParallelStrategy):
    """``distributed_sampler_kwargs``, ``process_dataloader`` and ``batch_to_device`` of the strategy."""

    _vocab_size: int | None = None
    _override: tuple[str, ...]
    _facts: dict[str, Any]
    _placed: list[data_position.PlacedSampler]
    """Of the training loaders, in the order of Lightning's calls."""
    _placed_at: int = -1
    _positions: Sequence[Any] = ()
    """Those of the samplers of the run that wrote the checkpoint, in the same order."""
    _position: Mapping[str, Any]
    """Where in the data the checkpoint was written: ``batch`` is the number of samples in its batches."""
    _saved_batch: int | None = None
    _batch_samples: int = 0

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Samplers that Lightning inserts cut the data by data-parallel rank: tensor-parallel peers agree."""
        layout = mesh.current()
        return {"num_replicas": layout.sizes["dp"], "rank": layout.coordinates["dp"]}

    def process_dataloader(self, dataloader: object) -> object:
        """Lets the training loader of a resumed fit go on after the batches that are already trained on.

        The samples are skipped where they are chosen, so nothing is read twice, and ``len()`` stays that of
        the whole epoch.

        Raises:
            DataError: the epoch's rest cannot be had exactly.
            ConfigError: the global batch is another one than that of the run that wrote the checkpoint.
        """
        trainer = self.lightning_module.trainer if self.lightning_module is not None else None
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return dataloader
        if trainer.state.stage != RunningStage.TRAINING:
            return dataloader
        self._check_global_batch(trainer, dataloader)
        done = self._batches_done(trainer, dataloader)
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
        if data_position.is_stateful(dataloader):
            if hasattr(dataloader, "__len__"):
                return dataloader
            return data_position.SteppedLoader(dataloader, partial(internals_loops.fetched_ahead, trainer))
        if data_position.is_map_style(dataloader):
            self._place(trainer, cast("DataLoader[Any]", dataloader), done)
        elif done and isinstance(dataloader, Sequence):
            return data_position.RestOf(dataloader, done)
        elif done and "data" not in self._override:
            raise data_position.refuse(dataloader, done)
        return dataloader

    def _place(self, trainer: Any, loader: DataLoader[Any], done: int) -> None:
        placed = data_position.place(loader)
        if self._placed_at != trainer.current_epoch:  # loaders may be made anew for each epoch
            self._placed, self._placed_at = [], trainer.current_epoch
        if placed not in self._placed:
            self._placed.append(placed)
        number = len(self._placed) - 1
        position = self._positions[number] if number < len(self._positions) else None
        if internals_loops.is_resuming(trainer) and done < len(placed):
            placed.start_at(done, trainer.current_epoch, position)

    def _batches_done(self, trainer: Any, loader: object) -> int:
        """Batches of this epoch that are trained on, in this run's batches."""
        done, position = internals_loops.completed_batches(trainer), self._position
        size = self._samples_in_batch(loader)
        if not done or not size or not position.get("batch") or size == position["batch"]:
            return done
        samples: int = done * position["batch"]
        if samples % size:
            raise DataError(
                f"the checkpoint was written after {samples} samples of the epoch, which is no whole number of this "
                f"run's batches of {size} (batch size times data-parallel ranks): choose a batch size that divides it."
            )
        self._position = {**position, "batch": size}
        internals_loops.set_completed_batches(trainer, samples // size)
        return int(samples // size)

    def _check_global_batch(self, trainer: Any, loader: object) -> None:
        """Notes the samples of an optimizer step, and compares them with the checkpoint's."""
        module = trainer.lightning_module
        factor = (
            trainer.accumulate_grad_batches
            if module.automatic_optimization
            else getattr(module, "grad_accum_steps", 1)
        )
        self._batch_samples = size = self._samples_in_batch(loader)
        if not size:
            return
        self._facts["global_batch_size"] = size * factor
        saved, self._saved_batch = self._saved_batch, None
        if saved is not None:
            drift.check({"global_batch_size": saved}, self._facts, self._override)

    def _samples_in_batch(self, loader: object) -> int:
        """Over all data-parallel ranks; 0 where the loader does not say."""
        batch = getattr(loader, "batch_size", None)
        if not isinstance(batch, int):
            batch = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        return batch * mesh.current().sizes["dp"] if isinstance(batch, int) else 0

    def data_state(self) -> dict[str, Any]:
        """What a checkpoint notes of the data on this rank."""
        return {"positions": [placed.position() for placed in self._placed]}

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Checks token ids while the batch is on the host, then moves it to the device.

        A mask of ones is marked as such, so that the model need not look at it on the device.

        Raises:
            DataError: an id outside the vocabulary, with its position.
        """
        if self._vocab_size is not None:
            check_token_ids(batch, self._vocab_size)
        unpadded = _unpadded_masks(batch)
        moved = super().batch_to_device(batch, device, dataloader_idx)
        for key in unpadded:
            mark_unpadded(moved[key])
        return moved


def vocab_size_of(module: nn.Module) -> int | None:
    """``config.vocab_size`` or ``vocab_size`` of the first submodule that has one."""
    for part in module.modules():
        for holder in (part.__dict__.get("config"), part):
            size = getattr(holder, "vocab_size", None)
            if isinstance(size, int) and not isinstance(size, bool) and size > 0:
                return size
    return None


def _unpadded_masks(batch: Any) -> list[str]:
    """The attention masks in a batch that is on the host which are all ones."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.device.type != "cpu" or mask.is_floating_point():
        return []
    if get_backend().records_graphs:  # two graphs, and not the same one on all ranks
        return []
    return ["attention_mask"] if mask.numpy().all() else []


def check_token_ids(batch: Any, vocab_size: int) -> None:
    """Checks the ids under ``input_ids`` and ``labels`` of a batch that is on the host.

    Raises:
        DataError: an id is negative or not below ``vocab_size`` (-100 is allowed among the labels).
    """
    if not isinstance(batch, Mapping):
        return
    for key, allowed in _ID_KEYS.items():
        ids = batch.get(key)
        if (
            not isinstance(ids, Tensor)
            or ids.device.type != "cpu"
            or ids.is_floating_point()
            or not ids.numel()
        ):
            continue
        values = ids.detach().numpy()
        if values.min() >= 0 and values.max() < vocab_size:
            continue
        wrong = (values < 0) | (values >= vocab_size)
        if allowed is not None:
            wrong &= values != allowed
        if wrong.any():
            position = tuple(int(i[0]) for i in wrong.nonzero())
            raise DataError(
                f"batch[{key!r}] of rank {mesh.current().rank} holds the token id {int(values[position])} at position "
                f"{position} (shape {tuple(ids.shape)}), but the model's vocabulary has {vocab_size} entries, "
                f"0 to {vocab_size - 1}: train with the tokenizer that the data was made with, or enlarge vocab_size."
            )
