"""Fixed-length sequences cut from packed token ids."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from neuron_lightning.data.pack import TokenFile
from neuron_lightning.errors import ConfigError, DataError


class TokenDataset(Dataset[dict[str, Tensor]]):
    """Sequence ``i`` is ids ``i * seq_len`` to ``(i + 1) * seq_len`` of the file; the rest is left out.

    An item is ``{"input_ids": (seq_len,) int64, "labels": (seq_len,) int64}`` with equal contents: the model
    shifts. With ``attention_mask`` there is also ``attention_mask: (seq_len,) int64``, all ones.

    Args:
        tokens: the packed ids.
        seq_len: ids in a sequence.
        start: first id of the part to use.
        stop: end of the part to use; None is the end of the file.
        attention_mask: add a mask of ones, for training steps that read one.

    Raises:
        ConfigError: ``seq_len`` below 2 (nothing to predict).
        DataError: not even one whole sequence.
    """

    def __init__(
        self,
        tokens: TokenFile,
        seq_len: int,
        *,
        start: int = 0,
        stop: int | None = None,
        attention_mask: bool = False,
    ) -> None:
        if seq_len < 2:
            raise ConfigError(f"seq_len must be at least 2 (a token and the one to predict), not {seq_len}.")
        stop = len(tokens) if stop is None else stop
        self.tokens = tokens
        self.seq_len = seq_len
        self._start = start
        self._num_sequences = (stop - start) // seq_len
        self._attention_mask = attention_mask
        if self._num_sequences < 1:
            raise DataError(
                f"{tokens.path}: {stop - start} token ids make no sequence of {seq_len}: give more text, or lower "
                f"seq_len to at most {stop - start}."
            )

    def __len__(self) -> int:
        return self._num_sequences

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._num_sequences:
            raise IndexError(f"sequence {index} of {self._num_sequences}")
        first = self._start + index * self.seq_len
        ids = torch.from_numpy(self.tokens.tokens[first : first + self.seq_len].astype(np.int64))
        item = {"input_ids": ids, "labels": ids}
        if self._attention_mask:
            item["attention_mask"] = torch.ones_like(ids)
        return item
