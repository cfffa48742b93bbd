"""Cross-entropy over a vocabulary that is sharded over the tensor-parallel ranks.

Each rank reduces its own columns to three numbers a token (log of the sum of exponentials, the target's
logit, and for label smoothing the sum of logits); one small all-gather joins them. The backward pass
computes the softmax again from the logits, so that nothing of the logits' size is kept beside them, and both
passes work on a few tokens at a time in fp32 (float64 for float64), so that no fp32 copy of them ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from neuron_lightning.backends import get_backend
from neuron_lightning.errors import ConfigError
from neuron_lightning.parallel.collectives import TensorParallel, tensor_parallel

_HOST_CHUNK = 1 << 18
"""Elements worked on at a time on the host, where temporaries should stay in a core's cache."""
_DEVICE_CHUNK = 1 << 26
"""The same on an accelerator, where every operator costs a launch."""


def parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
) -> Tensor:
    """Cross-entropy of each token, as ``torch.nn.functional.cross_entropy(reduction="none")``.

    Every rank of the tensor-parallel group calls it together, with the same targets.

    Args:
        vocab_parallel_logits: ``(…, vocab/tp)``, this rank's columns, any floating dtype.
        target: ``(…)`` integers; the correct token, or ``ignore_index``.
        label_smoothing: share of the target's probability that is spread evenly over the vocabulary.
        ignore_index: tokens with this target have loss 0 and no gradient.
        vocab_size: true vocabulary size where the columns were padded; the columns beyond are left out and
            get no gradient. None: all columns count.

    Returns:
        ``(…)`` loss, fp32 (float64 for float64 logits). A target outside the vocabulary gives NaN.

    Raises:
        ConfigError: shapes or settings that do not fit together.
    """
    tp = tensor_parallel()
    columns = vocab_parallel_logits.shape[-1]
    vocab_size = columns * tp.size if vocab_size is None else vocab_size
    _check(vocab_parallel_logits, target, label_smoothing, vocab_size, columns * tp.size)
    loss: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        vocab_parallel_logits.reshape(-1, columns),
        target.reshape(-1),
        label_smoothing,
        ignore_index,
        vocab_size,
        tp,
    )
    return loss.view(target.shape)


def _check(logits: Tensor, target: Tensor, label_smoothing: float, vocab_size: int, columns: int) -> None:
    if logits.shape[:-1] != target.shape:
        raise ConfigError(
            f"logits of shape {tuple(logits.shape)} need one target per token, but the targets have shape "
            f"{tuple(target.shape)}: pass targets of shape {tuple(logits.shape[:-1])}."
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ConfigError(f"label_smoothing must be between 0 and 1, not {label_smoothing}.")
    if not 0 < vocab_size <= columns:
        raise ConfigError(
            f"vocab_size {vocab_size} does not fit logits of {columns} columns over all ranks: it is the size "
            "before padding; correct it or leave it out."
        )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        smoothing: float,
        ignore_index: int,
        vocab_size: int,
        tp: TensorParallel,
    ) -> Tensor:
        columns = logits.shape[1]
        valid = max(0, min(columns, vocab_size - tp.rank * columns))
        local = target - tp.start(columns)
        mine = (local >= 0) & (local < valid)
        index = local.masked_fill(~mine, 0)
        log_sum, picked, total = _join(*_reduce(logits[:, :valid], index, mine, smoothing), tp)
        loss = log_sum - (1.0 - smoothing) * picked
        if smoothing:
            loss = loss - smoothing / vocab_size * total
        ignored = target == ignore_index
        outside = (target < 0) | (target >= vocab_size)
        loss = loss.masked_fill(outside, float("nan")).masked_fill(ignored, 0.0)
        ctx.save_for_backward(logits, index, mine, log_sum, ignored)
        ctx.valid, ctx.smoothing, ctx.vocab_size = valid, smoothing, vocab_size
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        logits, index, mine, log_sum, ignored = ctx.saved_tensors
        scale = grad_loss.masked_fill(ignored, 0.0)
        at_target = (scale * (ctx.smoothing - 1.0)).masked_fill(~mine, 0.0)
        spread = scale * (ctx.smoothing / ctx.vocab_size) if ctx.smoothing else None
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        if ctx.valid < logits.shape[1]:
            grad[:, ctx.valid :].zero_()
        if not ctx.valid:
            return grad, None, None, None, None, None
        for rows in _chunks(logits):
            softmax = torch.sub(logits[rows, : ctx.valid], log_sum[rows, None]).exp_().mul_(scale[rows, None])
            softmax.scatter_add_(1, index[rows, None], at_target[rows, None])
            if spread is not None:
                softmax.sub_(spread[rows, None])
            grad[rows, : ctx.valid].copy_(softmax)
        return grad, None, None, None, None, None


def _reduce(
    logits: Tensor, index: Tensor, mine: Tensor, smoothing: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Per token over this rank's columns: log-sum-exp, the target's logit or 0, the sum of logits if needed."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    tokens = logits.shape[0]
    log_sum = logits.new_full((tokens,), float("-inf"), dtype=dtype)
    picked = logits.new_zeros(tokens, dtype=dtype)
    total = logits.new_zeros(tokens, dtype=dtype) if smoothing else None
    if not logits.shape[1]:
        return log_sum, picked, total
    for rows in _chunks(logits):
        chunk = logits[rows]
        top = chunk.amax(-1).to(dtype).clamp_(min=torch.finfo(dtype).min)
        log_sum[rows] = torch.sub(chunk, top[:, None]).exp_().sum(-1).log_().add_(top)
        if total is not None:
            total[rows] = chunk.sum(-1, dtype=dtype)
    picked.copy_(logits.gather(1, index[:, None])[:, 0]).masked_fill_(~mine, 0.0)
    return log_sum, picked, total


def _join(
    log_sum: Tensor, picked: Tensor, total: Tensor | None, tp: TensorParallel
) -> tuple[Tensor, Tensor, Tensor]:
    """The ranks' three numbers a token, joined by one all-gather."""
    if tp.size == 1:
        return log_sum, picked, log_sum if total is None else total
    mine = torch.stack([log_sum, picked] if total is None else [log_sum, picked, total])
    parts = mine.new_empty((tp.size, *mine.shape))
    get_backend().all_gather(parts.flatten(0, 1), mine, tp.group)
    sums = parts.sum(0)
    return torch.logsumexp(parts[:, 0], 0), sums[1], sums[-1]


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows; one slice for all while compiling, where the compiler fuses the passes."""
    tokens, columns = logits.shape
    budget = _HOST_CHUNK if logits.device.type == "cpu" else _DEVICE_CHUNK
    fuses = torch.compiler.is_compiling() or get_backend().records_graphs
    step = tokens if fuses else max(1, budget // max(1, columns))
    for start in range(0, tokens, max(1, step)):
        yield slice(start, start + step)
