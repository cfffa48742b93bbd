"""One rank of ours beside Hugging Face's own model, optimizer and clipping: from the same weights, the same batches.

Deviations of a series (losses, grad norms) are norm-relative: the norm of the difference over the norm. Each is
shown beside what Hugging Face's model does to itself when only the order of its sums changes (the batch of 8 cut
into 4 micro-batches of 2), or when it trains in bf16.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM
from neuron_lightning.models.llama_hf import load_hf
from neuron_lightning.optim import ParallelOptimizer
from neuron_lightning.parallel.initialize import deferred_init

STEPS = 100
LR = 1e-3
FIRST_STEP_TOLERANCE = 1e-6
TOLERANCE = 1e-4
BF16_FACTOR = 2.0
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BATCH, LENGTH = 8, 64


@dataclass(frozen=True)
class Curve:
    """A training: losses, grad norms before clipping, and the logits of the first batch before any step."""

    losses: Tensor
    grad_norms: Tensor
    logits: Tensor


def deviations(curve: Curve, expected: Curve) -> dict[str, float]:
    """Relative differences: of the first step's loss and grad norm, of the whole series, of the logits."""
    return {
        "loss, step 1": _relative(curve.losses[:1], expected.losses[:1]),
        "grad norm, step 1": _relative(curve.grad_norms[:1], expected.grad_norms[:1]),
        "loss": _relative(curve.losses, expected.losses),
        "grad norm": _relative(curve.grad_norms, expected.grad_norms),
        "logits, step 1": _relative(curve.logits, expected.logits),
    }


def _relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def batch(step: int) -> Tensor:
    """Token ids (batch, length): noisy counting, so that there is something to learn."""
    random = torch.Generator().manual_seed(step)
    start = torch.randint(SHAPE["vocab_size"], (BATCH, 1), generator=random)
    ids = (start + 3 * torch.arange(LENGTH)) % SHAPE["vocab_size"]
    noise = torch.randint(SHAPE["vocab_size"], ids.shape, generator=random)
    return torch.where(torch.rand(ids.shape, generator=random) < 0.2, noise, ids)


def hf_model() -> Any:
    """Hugging Face's model in fp32, always the same weights."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM as HFLlama

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return HFLlama(HFConfig(**SHAPE))


def our_model(dtype: torch.dtype) -> LlamaForCausalLM:
    """Our model in ``dtype`` with the weights of :func:`hf_model`, through a folder."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with deferred_init():
            model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    finally:
        torch.set_default_dtype(before)
    with tempfile.TemporaryDirectory() as folder:
        hf_model().save_pretrained(folder)
        load_hf(model, folder)
    return model


@functools.cache
def train_hf(dtype: torch.dtype, micro_batches: int = 1, steps: int = STEPS) -> Curve:
    """``transformers`` + ``torch.optim.AdamW`` + ``clip_grad_norm_``."""
    model = hf_model().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

    def step() -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    return _train(model, step, micro_batches, steps)


@functools.cache
def train_ours(dtype: torch.dtype, master_weights: bool = False, steps: int = STEPS) -> Curve:
    """Our model and optimizer on one rank."""
    model = our_model(dtype)
    optimizer = ParallelOptimizer(
        torch.optim.AdamW(model.parameters(), lr=LR),
        zero1=False,
        max_grad_norm=1.0,
        master_weights=master_weights,
        fp32_grad_accumulation=master_weights,
    )

    def step() -> Tensor:
        optimizer.step()
        norm = optimizer.grad_norm.clone()
        optimizer.zero_grad()
        return norm

    return _train(model, step, 1, steps)


def _train(model: Any, step: Callable[[], Tensor], micro_batches: int, steps: int) -> Curve:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            logits = model(batch(0)).logits.float()
        losses, norms = [], []
        for index in range(steps):
            total = torch.zeros(())
            for ids in batch(index).chunk(micro_batches):
                loss = model(input_ids=ids, labels=ids).loss / micro_batches
                loss.backward()
                total += loss.detach().float()
            losses.append(total)
            norms.append(step().float())
        return Curve(torch.stack(losses), torch.stack(norms), logits)
    finally:
        torch.set_num_threads(threads)


def fp32_table() -> dict[str, dict[str, float]]:
    """Deviations from Hugging Face in fp32: ours, and its own with reordered batches."""
    expected = train_hf(torch.float32)
    return {
        "ours": deviations(train_ours(torch.float32), expected),
        "Hugging Face, batch 4 x 2": deviations(train_hf(torch.float32, 4), expected),
    }


def bf16_table(steps: int = STEPS) -> dict[str, dict[str, float]]:
    """Deviations of bf16 trainings from Hugging Face in fp32."""
    expected = train_hf(torch.float32, steps=steps)
    return {
        "ours, fp32 master weights": deviations(train_ours(torch.bfloat16, True, steps), expected),
        "ours, all bf16": deviations(train_ours(torch.bfloat16, False, steps), expected),
        "Hugging Face, all bf16": deviations(train_hf(torch.bfloat16, steps=steps), expected),
    }


def fp32_failures(table: dict[str, dict[str, float]]) -> list[str]:
    """What in :func:`fp32_table` is beyond its tolerance."""
    limits = {
        "loss, step 1": FIRST_STEP_TOLERANCE,
        "grad norm, step 1": FIRST_STEP_TOLERANCE,
        "loss": TOLERANCE,
        "grad norm": TOLERANCE,
    }
    ours = table["ours"]
    return [f"{name}: {ours[name]:.2e} > {limit:.0e}" for name, limit in limits.items() if ours[name] > limit]


def bf16_failures(table: dict[str, dict[str, float]]) -> list[str]:
    """What in :func:`bf16_table` is more than twice as far from fp32 as Hugging Face.

    The series and the logits count. The two scalars of step 1 are shown only: one rounded number may lie close to
    fp32 by luck, theirs as well as ours.
    """
    theirs = table["Hugging Face, all bf16"]
    return [
        f"{row}, {name}: {value:.2e} > {BF16_FACTOR:g} x {theirs[name]:.2e}"
        for row, values in table.items()
        if row.startswith("ours")
        for name, value in values.items()
        if name in ("loss", "grad norm", "logits, step 1") and value > BF16_FACTOR * theirs[name]
    ]
