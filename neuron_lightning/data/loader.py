"""A DataLoader over packed tokens, dealt out to the data-parallel ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from neuron_lightning.data.prepare import HELDOUT_FRACTION, open_prepared
from neuron_lightning.data.sampler import PositionalSampler
from neuron_lightning.errors import ConfigError


def create_pretraining_dataloader(
    data_dir: str | Path,
    batch_size: int,
    dp_size: int,
    dp_rank: int,
    seed: int = 1234,
    *,
    seq_len: int = 256,
    split: str = "train",
    shuffle: bool | None = None,
    attention_mask: bool = False,
    num_workers: int = 0,
    pin_memory: bool = False,
    heldout_fraction: float = HELDOUT_FRACTION,
) -> DataLoader[dict[str, Tensor]]:
    """Batches of ``{"input_ids", "labels"}: (batch_size, seq_len) int64``, this data-parallel rank's share.

    Ranks of one tensor-parallel group give the same ``dp_rank`` and get identical batches. All batches are
    whole: what does not fill a global batch at the end of an epoch is left out (see ``PositionalSampler``).
    Its signature is that of ``NeuronLightningDataModule``'s ``dataloader_fn``.

    Args:
        data_dir: a folder made by ``prepare_pretraining_data``, or a ``.bin``/``.npy`` of token ids.
        batch_size: sequences of one rank's batch.
        dp_size: data-parallel size.
        dp_rank: data-parallel rank.
        seed: draws the order.
        seq_len: ids in a sequence.
        split: ``train`` or ``heldout``.
        shuffle: None shuffles ``train`` only.
        attention_mask: add ``attention_mask``, all ones.
        num_workers: worker processes; the batches do not depend on it.
        pin_memory: copy batches to page-locked memory, for devices that gain by it.
        heldout_fraction: share of a ready token file's tail that is the ``heldout`` split.

    Raises:
        ConfigError: a size out of range.
        DataError: the data is missing, or too small for one global batch.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}.")
    dataset = open_prepared(data_dir, heldout_fraction).dataset(split, seq_len, attention_mask=attention_mask)
    sampler = PositionalSampler(
        dataset,
        num_replicas=dp_size,
        rank=dp_rank,
        seed=seed,
        shuffle=split == "train" if shuffle is None else shuffle,
        group_size=batch_size * dp_size,
    )
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=True,
        persistent_workers=num_workers > 0,
        # its own generator: a loader that draws from the global one would move the model's dropout
        generator=torch.Generator().manual_seed(seed),
    )
