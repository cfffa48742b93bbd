"""Text to pretraining batches under the Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from neuron_lightning.data import (
    BpeTokenizer,
    PreparedData,
    create_pretraining_dataloader,
    prepare_pretraining_data,
)
from neuron_lightning.data.prepare import HELDOUT_FRACTION
from neuron_lightning.errors import ConfigError, DataError


class PretrainingDataModule(LightningDataModule):
    """Tokenises and packs text once, then deals fixed-length batches out to the data-parallel ranks.

    The order of samples is a function of (seed, epoch) alone; ranks of one tensor-parallel group get identical
    batches. A part of the documents is held out and becomes the validation data.

    Args:
        data: text files, a folder, a glob, JSON lines with a ``text`` field, or a ready ``.bin``/``.npy`` of
            token ids; None is the text of the running Python's standard library.
        data_dir: where tokenised data is kept between runs.
        seq_len: token ids in a sequence.
        batch_size: sequences of one rank's batch.
        vocab_size: size of the byte-level BPE that is trained.
        seed: draws the order of samples.
        tokenizer: a ``tokenizer.json`` to use instead of training one.
        heldout_fraction: share of the documents that is held out.
        max_bytes: cap on the embedded corpus; only without ``data``.
        attention_mask: add a mask of ones to the batches.
        num_workers: worker processes of the loaders.

    Raises:
        ConfigError, DataError: as :func:`neuron_lightning.data.prepare_pretraining_data`.
    """

    def __init__(
        self,
        data: str | list[str] | None = None,
        data_dir: str = "runs/data",
        *,
        seq_len: int = 256,
        batch_size: int = 8,
        vocab_size: int = 4096,
        seed: int = 1234,
        tokenizer: str | None = None,
        heldout_fraction: float = HELDOUT_FRACTION,
        max_bytes: int | None = None,
        attention_mask: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.data: Sequence[str | Path] | str | None = data
        self.data_dir = data_dir
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.vocab_size = vocab_size
        self.seed = seed
        self.tokenizer_file = tokenizer
        self.heldout_fraction = heldout_fraction
        self.max_bytes = max_bytes
        self.attention_mask = attention_mask
        self.num_workers = num_workers
        self._prepared: PreparedData | None = None

    @property
    def prepared(self) -> PreparedData:
        """The token files; known after ``setup``."""
        if self._prepared is None:
            raise ConfigError("the data is not prepared yet: call prepare_data() and setup('fit') first.")
        return self._prepared

    def tokenizer(self) -> BpeTokenizer | None:
        """The tokenizer of the data; None for ready token ids that came without one."""
        return self.prepared.tokenizer()

    def prepare_data(self) -> None:
        """Tokenises and packs, on one rank of each node; shows a bar when it takes more than two seconds."""
        self._prepare(show_progress=True)

    def setup(self, stage: str) -> None:
        """Opens the token files on every rank and makes sure that all ranks see the same ones.

        Raises:
            DataError: this rank's data or tokenizer differ from rank 0's (nodes without a shared file system,
                whose texts or whose Python differ).
        """
        self._prepared = self._prepare(show_progress=False)
        mine = _identity(self._prepared)
        if self.trainer is None:
            return
        first = self.trainer.strategy.broadcast(mine)
        if first != mine:
            raise DataError(
                f"rank {self.trainer.global_rank} prepared other data than rank 0 ({mine} against {first}, as tokens, "
                "tokenizer and source): put data_dir on a file system that all nodes share, or copy it to them."
            )
        if stage == "fit":
            rank_zero_info("%s", self._summary())

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Shuffled batches of the training documents: this data-parallel rank's share."""
        return self._loader("train", self.batch_size)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches of the held-out documents, in order; smaller ones where there are too few for a whole one."""
        available = len(self.prepared.dataset("heldout", self.seq_len)) // self._replicas()[0]
        return self._loader("heldout", max(1, min(self.batch_size, available)))

    def _prepare(self, *, show_progress: bool) -> PreparedData:
        return prepare_pretraining_data(
            self.data,
            self.data_dir,
            vocab_size=self.vocab_size,
            heldout_fraction=self.heldout_fraction,
            max_bytes=self.max_bytes,
            tokenizer=self.tokenizer_file,
            show_progress=show_progress,
        )

    def _loader(self, split: str, batch_size: int) -> DataLoader[dict[str, Tensor]]:
        dp_size, dp_rank = self._replicas()
        return create_pretraining_dataloader(
            self.prepared.path,
            batch_size,
            dp_size,
            dp_rank,
            self.seed,
            seq_len=self.seq_len,
            split=split,
            attention_mask=self.attention_mask,
            num_workers=self.num_workers,
            heldout_fraction=self.heldout_fraction,
        )

    def _replicas(self) -> tuple[int, int]:
        """Data-parallel size and rank; one of one outside of a Trainer."""
        if self.trainer is None:
            return 1, 0
        kwargs: dict[str, Any] = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None) or {}
        return int(kwargs.get("num_replicas", 1)), int(kwargs.get("rank", 0))

    def _summary(self) -> str:
        prepared = self.prepared
        train = prepared.dataset("train", self.seq_len)
        heldout = prepared.dataset("heldout", self.seq_len)
        return (
            f"data: {prepared.path}\n"
            f"  {len(train):,} training and {len(heldout):,} held-out sequences of {self.seq_len} tokens, "
            f"{self.batch_size} x {self._replicas()[0]} of them in a batch"
        )


def _identity(prepared: PreparedData) -> tuple[int, str, str]:
    sidecar = prepared.train.sidecar
    return (
        len(prepared.train),
        *((sidecar.tokenizer_digest, sidecar.source_digest) if sidecar else ("", "")),
    )
