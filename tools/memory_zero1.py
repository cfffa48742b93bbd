"""Memory of ZeRO-1 per rank against its formula: ``python tools/memory_zero1.py``.

Bytes per parameter and rank, with d data-parallel ranks and AdamW:

- bf16 with fp32 master weights: weights 2 + gradients 2 (4 accumulated in fp32) + (4 + 4 + 4) / d
- fp32: weights 4 + gradients 4 + (4 + 4) / d

Found by walking the heap: every live tensor's storage, counted once. Peak resident memory stands beside it, less
what the process held before the model was built; it includes what comes and goes within a step (at most one
bucket of the optimizer's, and the gradients of the layer in work).
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from neuron_lightning.optim import ParallelOptimizer
from neuron_lightning.parallel import parallel_state
from neuron_lightning.testing import run_distributed

WIDTH = 1024
TOLERANCE = 0.05


@dataclass(frozen=True)
class Kind:
    """One way to train.

    Attributes:
        dtype: of the weights.
        fp32_accumulation: accumulate gradients in fp32.
        resident: bytes a parameter that every rank holds.
        sharded: bytes a parameter that the ranks share.
    """

    dtype: torch.dtype
    fp32_accumulation: bool
    resident: int
    sharded: int

    def expected(self, dp: int) -> float:
        """Bytes a parameter and rank."""
        return self.resident + self.sharded / dp


KINDS = {
    "bf16, fp32 gradients": Kind(torch.bfloat16, True, 2 + 4, 12),
    "bf16, bf16 gradients": Kind(torch.bfloat16, False, 2 + 2, 12),
    "fp32": Kind(torch.float32, False, 4 + 4, 8),
}


def live_bytes() -> int:
    """Bytes of all storages that live tensors of this process use, each counted once."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(kind: Kind, num_layers: int, width: int) -> tuple[int, int, int]:
    """Trains two steps of two micro-batches. Every rank calls it together.

    Returns:
        Parameters, live bytes afterwards (less those from before), growth of the peak resident memory in bytes.
    """
    live_before, peak_before = live_bytes(), _peak_rss()
    parallel_state.initialize_model_parallel()
    try:
        layers = (nn.Linear(width, width, bias=False, dtype=kind.dtype) for _ in range(num_layers))
        model = nn.Sequential(*layers)
        optimizer = ParallelOptimizer(
            torch.optim.AdamW(model.parameters(), lr=1e-4),
            zero1=True,
            max_grad_norm=1.0,
            master_weights=True,
            fp32_grad_accumulation=kind.fp32_accumulation,
        )
        for _ in range(2):
            for _ in range(2):
                model(torch.ones(1, width, dtype=kind.dtype)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        num_params = sum(p.numel() for p in model.parameters())
        return num_params, live_bytes() - live_before, _peak_rss() - peak_before
    finally:
        parallel_state.destroy_model_parallel()


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """Prints the table; 1 if a cell is off by more than 5 %."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=float, default=40.0, help="parameters, in millions")
    parser.add_argument("--dp", type=int, nargs="+", default=[1, 2, 4], help="data-parallel sizes")
    args = parser.parse_args()
    num_layers = max(1, round(args.millions * 1e6 / WIDTH**2))
    print(f"{num_layers * WIDTH**2 / 1e6:.1f} M parameters, AdamW, ZeRO-1, per rank (worst rank)\n")
    print("| weights | dp | formula B/param | live B/param | off | live MB | peak resident MB |")
    print("|---|---|---|---|---|---|---|")
    worst = 0.0
    for name, kind in KINDS.items():
        for dp in args.dp:
            ranks = run_distributed(measure, dp, kind, num_layers, WIDTH, timeout=600)
            num_params, live, _ = max(ranks, key=lambda r: r[1])
            off = live / num_params / kind.expected(dp) - 1
            worst = max(worst, abs(off))
            peak = max(r[2] for r in ranks) / 1e6
            print(
                f"| {name} | {dp} | {kind.expected(dp):.2f} | {live / num_params:.2f} | {off:+.2%} "
                f"| {live / 1e6:.0f} | {peak:.0f} |",
                flush=True,
            )
    print(f"\nworst deviation {worst:.2%} (limit {TOLERANCE:.0%})")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
