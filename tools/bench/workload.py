"""What every peer trains: the model, its batches, its arithmetic."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SEED = 1234


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A Llama and how it is trained; one number of sequences per process, whatever the layout."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    sequence: int
    sequences_per_process: int
    lr: float = 3e-4
    max_grad_norm: float = 1.0

    def hf_config(self) -> dict[str, Any]:
        """Keywords of ``transformers.LlamaConfig``."""
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.sequence,
            "tie_word_embeddings": False,
        }

    def shapes(self) -> list[tuple[int, int, int]]:
        """(inputs, outputs, times per forward) of every matrix product with a weight."""
        head = self.hidden // self.heads
        return [
            (self.hidden, head * (self.heads + 2 * self.kv_heads), self.layers),
            (self.hidden, self.hidden, self.layers),
            (self.hidden, 2 * self.intermediate, self.layers),
            (self.intermediate, self.hidden, self.layers),
            (self.hidden, self.vocab, 1),
        ]

    def flop_per_token(self) -> float:
        """Forward and backward; causal attention counted half, the embedding's lookup not at all."""
        weights = sum(inputs * outputs * times for inputs, outputs, times in self.shapes())
        return 6.0 * weights + 6.0 * self.layers * self.sequence * self.hidden

    def tokens(self, world_size: int) -> int:
        """Tokens of a global batch."""
        return self.sequence * self.sequences_per_process * world_size

    def batch(self, step: int, replica: int, num_replicas: int, world_size: int) -> Tensor:
        """(sequences of this replica, sequence) int64: a slice of the step's global batch."""
        generator = torch.Generator().manual_seed(SEED + step)
        shape = (self.sequences_per_process * world_size, self.sequence)
        return torch.randint(self.vocab, shape, generator=generator).chunk(num_replicas)[replica]

    def asdict(self) -> dict[str, Any]:
        """The fields as a plain dict."""
        return dataclasses.asdict(self)


SMALL = Workload(
    hidden=512,
    layers=8,
    heads=8,
    kv_heads=4,
    intermediate=1408,
    vocab=16384,
    sequence=512,
    sequences_per_process=4,
)
TINY = Workload(
    hidden=128,
    layers=2,
    heads=4,
    kv_heads=2,
    intermediate=384,
    vocab=1024,
    sequence=128,
    sequences_per_process=2,
)
WORKLOADS = {"small": SMALL, "tiny": TINY}


def matmul_flops(workload: Workload, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of ``torch.mm`` over the model's own shapes, each as often as a forward has it."""
    rows = workload.sequence * workload.sequences_per_process
    pairs = [
        (torch.randn(rows, i).to(dtype), torch.randn(i, o).to(dtype), n) for i, o, n in workload.shapes()
    ]
    for x, w, _ in pairs:
        torch.mm(x, w)
    flop = took = 0.0
    while took < seconds:
        start = time.perf_counter()
        for x, w, times in pairs:
            for _ in range(times):
                torch.mm(x, w)
        took += time.perf_counter() - start
        flop += sum(2.0 * rows * i * o * n for i, o, n in workload.shapes())
    return flop / took
