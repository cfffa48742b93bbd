"""Few shapes for samples of many lengths: every length is rounded up to one of a few buckets.

Neuron's compiler, XLA and ``torch.compile`` with static shapes build one graph per shape of their inputs, and a
build can take minutes. :class:`PadToBuckets` pads a batch to a bucket, so that there are at most as many shapes as
buckets; :class:`~neuron_lightning.data.BucketBatchSampler` puts samples of one bucket into a batch, on all ranks at the same step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuron_lightning.errors import ConfigError

_MASK = "attention_mask"
LENGTH_REMEDY = "add a larger bucket, leave such samples out, or cut them with truncate=True."
_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
_Ids = npt.NDArray[np.int64]


def check_buckets(buckets: Iterable[int], *, multiple_of: int = 1) -> tuple[int, ...]:
    """The buckets as a tuple.

    Args:
        buckets: lengths in tokens.
        multiple_of: what each must be a multiple of: the tensor-parallel size under sequence parallel.

    Raises:
        ConfigError: none, or not positive ints that rise strictly, or not multiples of ``multiple_of``.
    """
    found = tuple(buckets)
    whole = all(isinstance(b, (int, np.integer)) and not isinstance(b, bool) for b in found)
    if not found or not whole or found[0] < 1 or any(b <= a for a, b in pairwise(found)):
        raise ConfigError(
            f"buckets must be positive ints in rising order, each once, not {list(found)}: for example "
            "[128, 256, 512], or powers_of_two_buckets(128, 512)."
        )
    if multiple_of < 1:
        raise ConfigError(f"multiple_of must be at least 1, not {multiple_of}.")
    if wrong := [int(b) for b in found if b % multiple_of]:
        raise ConfigError(
            f"buckets must be multiples of {multiple_of}, but {wrong} are not: round them up to "
            f"{[-(-b // multiple_of) * multiple_of for b in wrong]}."
        )
    return tuple(int(b) for b in found)


def powers_of_two_buckets(minimum: int, maximum: int, *, multiple_of: int = 1) -> tuple[int, ...]:
    """The powers of two from ``minimum`` on that lie below ``maximum``, then ``maximum`` itself.

    A sample longer than the first bucket is padded to less than twice its length.

    Args:
        minimum: the first bucket is the smallest power of two that is not below it (at most ``maximum``).
        maximum: length of the longest sample; it need not be a power of two.
        multiple_of: see :func:`check_buckets`.

    Raises:
        ConfigError: not ``1 <= minimum <= maximum``, or a bucket is no multiple of ``multiple_of``.
    """
    if not 1 <= minimum <= maximum:
        raise ConfigError(f"buckets need 1 <= minimum <= maximum, not minimum {minimum}, maximum {maximum}.")
    first, last = (minimum - 1).bit_length(), (maximum - 1).bit_length()
    return check_buckets((*(1 << power for power in range(first, last)), maximum), multiple_of=multiple_of)


def bucket_length(length: int, buckets: Sequence[int], *, truncate: bool = False) -> int:
    """The smallest bucket that is not below ``length``.

    Args:
        length: tokens of a sample.
        buckets: see :func:`check_buckets`.
        truncate: give the largest bucket to longer samples, for callers that cut them.

    Raises:
        ConfigError: ``length`` is above the largest bucket (without ``truncate``) or negative; bad buckets.
    """
    buckets = check_buckets(buckets)
    if length < 0:
        raise ConfigError(f"a length must not be negative, but is {length}.")
    if length > buckets[-1] and not truncate:
        raise ConfigError(
            f"a sample must not be longer than the largest bucket, but has {length} tokens, and the buckets are "
            f"{list(buckets)}: {LENGTH_REMEDY}"
        )
    return buckets[min(bisect_left(buckets, length), len(buckets) - 1)]


class PadToBuckets:
    """A ``collate_fn`` that pads a batch on the right, to the bucket of its longest sample.

    A sample is a mapping. Its sequences (tensors, numpy arrays, lists, tuples; ``(length, …)``, one length for all
    of a sample) become ``(rows, bucket, …)``, its numbers ``(rows,)``. A sample may also be a sequence itself; then
    the batch is one tensor, padded with ``pad_token_id``. Dtypes are torch's for the values, unsigned integers of
    more than 8 bits become int64.

    With ``batch_size`` an incomplete batch is filled up to that many rows, in which every entry is its pad value:
    labels -100, mask 0. A loss that is a mean over the tokens whose label is not -100 (our Llama's, Hugging Face's)
    is the same with and without such rows; a mean over rows or over all tokens is not, nor is the loss of a step
    that takes ``input_ids`` for labels.

    Args:
        buckets: lengths in tokens, see :func:`check_buckets`.
        pad_token_id: pads ``input_ids``; an id of the vocabulary.
        pad_values: pad value of further keys. Default: ``labels`` -100, everything else 0.
        attention_mask: ``"create"`` adds ``attention_mask: (rows, bucket) int64`` (1 for tokens, 0 for padding) to
            samples that have none; ``"keep"`` hands on what there is; ``"drop"`` leaves it out. Drop it for a causal
            decoder: no token attends to what stands to its right, and padding has no label. There a mask costs
            speed and graphs, because a batch without padding takes the path without a mask, on its rank alone.
        batch_size: rows of every batch; None: as many as there are samples.
        truncate: cut samples that are longer than the largest bucket at their end.
        multiple_of: what each bucket must be a multiple of, see :func:`check_buckets`.

    Raises:
        ConfigError: on construction: a setting out of range. On a call: a sample is too long, its sequences have
            different lengths, samples differ in keys or kinds, an entry holds no numbers, or a pad value does not
            fit its entry's dtype.
    """

    def __init__(
        self,
        buckets: Iterable[int],
        *,
        pad_token_id: int,
        pad_values: Mapping[str, float] | None = None,
        attention_mask: Literal["create", "keep", "drop"] = "create",
        batch_size: int | None = None,
        truncate: bool = False,
        multiple_of: int = 1,
    ) -> None:
        if attention_mask not in ("create", "keep", "drop"):
            raise ConfigError(f'attention_mask must be "create", "keep" or "drop", not {attention_mask!r}.')
        if pad_token_id < 0:
            raise ConfigError(
                f"pad_token_id must be an id of the vocabulary, not {pad_token_id}: a tokenizer without a pad token "
                "can use its end-of-text token, as padding has no label."
            )
        if "input_ids" in (pad_values or {}):
            raise ConfigError("input_ids are padded with pad_token_id: leave them out of pad_values.")
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}.")
        self.buckets = check_buckets(buckets, multiple_of=multiple_of)
        self.pad_values = {"labels": -100, **(pad_values or {}), "input_ids": pad_token_id}
        self.attention_mask = attention_mask
        self.batch_size = batch_size
        self.truncate = truncate

    def __call__(self, samples: Sequence[Any]) -> Any:
        """One batch: a dict of tensors, or a tensor if the samples are sequences."""
        if not 1 <= len(samples) <= (self.batch_size or len(samples)):
            raise ConfigError(
                f"a batch must have 1 to {self.batch_size or 'any number of'} samples, not {len(samples)}: give "
                "PadToBuckets the batch size of the DataLoader or batch sampler."
            )
        if any(isinstance(sample, Mapping) for sample in samples):
            return self._batch(samples)
        return self._batch([{"input_ids": sample} for sample in samples], create=False)["input_ids"]

    def _batch(self, samples: Sequence[Mapping[str, Any]], create: bool = True) -> dict[str, Tensor]:
        if others := [type(sample).__name__ for sample in samples if not isinstance(sample, Mapping)]:
            raise ConfigError(
                f"the samples of a batch must all be mappings or none, but one is a {others[0]}."
            )
        dropped = {_MASK} if self.attention_mask == "drop" else set()
        keys = [key for key in samples[0] if key not in dropped]
        if unequal := [sorted(s) for s in samples if set(s) - dropped != set(keys)]:
            raise ConfigError(
                f"the samples of a batch must have the same keys, not {sorted(keys)} and {unequal[0]}: add the "
                "missing ones in the dataset, or remove them from all samples."
            )
        columns = {key: [_tensor(key, sample[key]) for sample in samples] for key in keys}
        lengths = [_length({key: columns[key][i] for key in keys}) for i in range(len(samples))]
        bucket = bucket_length(max(lengths), self.buckets, truncate=self.truncate)
        if create and self.attention_mask == "create" and _MASK not in columns:
            columns[_MASK] = [torch.ones(length, dtype=torch.int64) for length in lengths]
        return {key: self._pad(key, values, bucket) for key, values in columns.items()}

    def _pad(self, key: str, values: Sequence[Tensor], bucket: int) -> Tensor:
        kinds = {(value.dim(), value.shape[1:]) for value in values}
        if len(kinds) > 1:
            raise ConfigError(
                f"{key!r} must have the same shape in all samples, apart from the length, not "
                f"{sorted({tuple(value.shape) for value in values})}."
            )
        dtype = reduce(torch.promote_types, [v.dtype for v in values if v.numel()] or [values[0].dtype])
        value = self.pad_values.get(key, 0)
        if not _fits(value, dtype):
            raise ConfigError(
                f"{key!r} is padded with {value}, which {dtype} cannot hold: give samples of another dtype, or "
                f"another value with pad_values={{{key!r}: …}}."
            )
        rows = self.batch_size or len(values)
        shape = (rows, bucket, *values[0].shape[1:]) if values[0].dim() else (rows,)
        padded = torch.full(shape, value, dtype=dtype)
        for row, one in enumerate(values):
            if one.dim():
                padded[row, : len(one)] = one[:bucket]
            else:
                padded[row] = one
        return padded


def _tensor(key: str, value: Any) -> Tensor:
    try:
        # A copy of arrays, because torch warns of those that are read-only, such as a memory map's.
        tensor = torch.as_tensor(np.array(value) if isinstance(value, np.ndarray) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"entries of a sample must be numbers or sequences of numbers, but {key!r} holds {value!r:.60} "
            f"({error}): remove it from the dataset's samples."
        ) from error
    empty_list = isinstance(value, (list, tuple)) and not tensor.numel()
    return tensor.long() if empty_list or tensor.dtype in _WIDE_UNSIGNED else tensor


def _length(sample: Mapping[str, Tensor]) -> int:
    lengths = {key: len(value) for key, value in sample.items() if value.dim()}
    if not lengths:
        raise ConfigError(
            f"a sample must have a sequence, such as input_ids, but holds numbers only: {sorted(sample)}."
        )
    if len(set(lengths.values())) > 1:
        raise ConfigError(
            f"the sequences of a sample must have one length, not {lengths}: pad or cut them alike in the dataset, "
            "or remove what does not run along the tokens."
        )
    return next(iter(lengths.values()))


def _fits(value: float, dtype: torch.dtype) -> bool:
    if dtype.is_floating_point or dtype.is_complex:
        return True
    if dtype == torch.bool:
        return value in (0, 1)
    info = torch.iinfo(dtype)
    return float(value).is_integer() and info.min <= value <= info.max
