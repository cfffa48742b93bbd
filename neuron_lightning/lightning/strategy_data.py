"""Loaders and batches: who reads which samples, where a resumed epoch goes on, and ids that fit the vocabulary."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler

from neuron_lightning.errors import DataError
from neuron_lightning.lightning import internals_loops
from neuron_lightning.models.attention_mask import mark_unpadded
from neuron_lightning.parallel import mesh

_IGNORED_LABEL = -100
_ID_KEYS = {"input_ids": None, "labels": _IGNORED_LABEL}
"""Batch entries that hold token ids, and the value outside the vocabulary that is allowed there."""


class DataMixin(ParallelStrategy):
    """``distributed_sampler_kwargs``, ``process_dataloader`` and ``batch_to_device`` of the strategy."""

    _vocab_size: int | None = None

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Samplers that Lightning inserts cut the data by data-parallel rank: tensor-parallel peers agree."""
        layout = mesh.current()
        return {"num_replicas": layout.sizes["dp"], "rank": layout.coordinates["dp"]}

    def process_dataloader(self, dataloader: object) -> object:
        """Lets the training loader of a resumed fit go on after the batches that are already trained on.

        The samples are skipped where they are chosen, so nothing is read twice, and ``len()`` stays that of
        the whole epoch. An iterable dataset cannot be skipped so; Lightning then says that it starts over.
        """
        trainer = self.lightning_module.trainer if self.lightning_module is not None else None
        if trainer is None or not isinstance(dataloader, DataLoader):
            return dataloader
        if trainer.state.fn != TrainerFn.FITTING or trainer.state.stage != RunningStage.TRAINING:
            return dataloader
        done = internals_loops.completed_batches(trainer)
        if done and not isinstance(dataloader.dataset, IterableDataset):
            _skip_batches(dataloader, done, trainer.current_epoch)
        return dataloader

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


def _skip_batches(loader: DataLoader[Any], count: int, epoch: int) -> None:
    name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
    inner = getattr(loader, name)
    samplers: tuple[Any, Any] = (loader.sampler, getattr(inner, "sampler", None))
    for sampler in samplers:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
    if count >= len(inner):
        return
    # DataLoader refuses assignment after construction, although it reads these attributes at every iter().
    object.__setattr__(loader, name, _ResumedSampler(inner, count))
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")


class _ResumedSampler(Sampler[Any]):
    """``inner`` without its first ``skip`` items, once; afterwards ``inner`` itself."""

    def __init__(self, inner: Any, skip: int) -> None:
        self._inner = inner
        self._skip = skip

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[Any]:
        skip, self._skip = self._skip, 0
        items: Iterator[Any] = iter(self._inner)
        for _ in range(skip):
            next(items, None)
        return items
