"""The training that every cell does, and how far it is from one rank's.

Float64, 100 steps, the same global batches and initial weights everywhere: data-parallel ranks and micro-batches
take slices. What is left between two layouts is the order of sums, some 1e-16 a step. The learning rates are such
that training is stable: where it is not (momentum SGD at five times this rate), any two orders of sums part by a
factor of ten every few steps, and nothing could be told from step 100.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_lightning.checkpoint.boxes import placements, view
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM
from neuron_lightning.optim import ParallelOptimizer
from neuron_lightning.parallel import mesh
from neuron_lightning.parallel.initialize import deferred_init, materialize
from neuron_lightning.testing import RankPool
from tests.devices import default_dtype, layout_if
from tests.parity.cells import Cell

STEPS = 100
TOLERANCE = 1e-10
SEED = 7
BATCH, LENGTH, VOCAB, IGNORED, EPOCH = 16, 16, 64, 3, 8
HYPER_PARAMETERS = {
    "AdamW": {"lr": 2e-3, "betas": (0.9, 0.95)},
    "Adam": {"lr": 2e-3, "betas": (0.9, 0.95)},
    "SGD": {"lr": 0.02, "momentum": 0.9},
}
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0

Boxes = list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]


@dataclass(frozen=True)
class Run:
    """What one rank saw.

    Attributes:
        losses: by step, the mean over this rank's tokens.
        grad_norms: by step, before clipping.
        boxes: final weights: canonical name, global shape, offset, values.
    """

    losses: Tensor
    grad_norms: Tensor
    boxes: Boxes


@dataclass(frozen=True)
class Deviations:
    """The largest relative differences from one rank.

    Attributes:
        loss: over all steps.
        grad_norm: over all steps.
        weight: norm of the difference over norm, over all global unfused tensors.
        copies: largest absolute difference between ranks that hold the same elements: must be 0.
        tensor: name of the tensor that ``weight`` is about.
    """

    loss: float
    grad_norm: float
    weight: float
    copies: float
    tensor: str

    @property
    def worst(self) -> float:
        """The largest of the three that the tolerance is about."""
        return max(self.loss, self.grad_norm, self.weight)

    @property
    def passed(self) -> bool:
        """Within tolerance, and copies bit for bit equal."""
        return self.worst <= TOLERANCE and self.copies == 0.0


def train(cell: Cell, steps: int = STEPS) -> Run:
    """Trains ``cell`` on this rank; every rank of the world calls it together."""
    with layout_if(cell.world_size > 1, cell.tp, sequence_parallel=cell.sp):
        return _train(cell, steps)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels (batch, length) of a step; each sequence has equally many labels left out."""
    random = torch.Generator().manual_seed(step % EPOCH)
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=random)
    out = 1 + torch.rand(BATCH, LENGTH - 1, generator=random).argsort(1)[:, :IGNORED]
    return ids, ids.scatter(1, out, -100)


def build(cell: Cell) -> LlamaForCausalLM:
    """The tiny float64 model of ``cell`` on the current mesh."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=cell.kv_heads,
        max_position_embeddings=LENGTH,
        initializer_range=0.15,
        tie_word_embeddings=cell.tied,
    )
    with default_dtype(torch.float64), deferred_init():
        model = LlamaForCausalLM(config)
    materialize(model, SEED)
    return model


def optimizer_for(cell: Cell, model: LlamaForCausalLM) -> ParallelOptimizer:
    """Two parameter groups, as scripts have them: matrices decay, norms do not."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0},
    ]
    inner = getattr(torch.optim, cell.optimizer)(groups, **HYPER_PARAMETERS[cell.optimizer])
    return ParallelOptimizer(inner, zero1=cell.zero1, max_grad_norm=MAX_GRAD_NORM)


def _train(cell: Cell, steps: int) -> Run:
    model = build(cell)
    optimizer = optimizer_for(cell, model)
    dp_rank = mesh.current().coordinates["dp"]
    losses, norms = [], []
    for step in range(steps):
        ids, labels = (t.chunk(cell.dp)[dp_rank] for t in batch(step))
        micro_batches = zip(ids.chunk(cell.accumulation), labels.chunk(cell.accumulation), strict=True)
        total = torch.zeros((), dtype=torch.float64)
        for micro_ids, micro_labels in micro_batches:
            loss = model(micro_ids, labels=micro_labels).loss / cell.accumulation
            loss.backward()
            total += loss.detach()
        optimizer.step()
        losses.append(total)
        norms.append(optimizer.grad_norm.clone())
        optimizer.zero_grad()
    return Run(torch.stack(losses), torch.stack(norms), _boxes(model))


def _boxes(model: LlamaForCausalLM) -> Boxes:
    found = []
    for name, param in model.named_parameters():
        for p in placements(name, param, mesh.current().sizes["tp"]):
            found.append((p.name, p.global_shape, p.box.offset, view(param.detach(), p.local).clone()))
    return found


@functools.cache
def reference(cell: Cell, steps: int = STEPS) -> Run:
    """The single-rank run that ``cell`` (a :class:`~tests.parity.cells.Reference`) describes, in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train(cell, steps)
    finally:
        torch.set_num_threads(threads)


def compare(runs: Sequence[Run], expected: Run) -> Deviations:
    """How far the ranks of a cell are from one rank."""
    loss = torch.stack([run.losses for run in runs]).mean(0)
    norms = torch.stack([run.grad_norms for run in runs])
    weights, copies = assemble(runs)
    wanted, _ = assemble([expected])
    assert weights.keys() == wanted.keys()
    by_tensor = {n: float((weights[n] - w).norm() / w.norm()) for n, w in wanted.items()}
    tensor = max(by_tensor, key=by_tensor.__getitem__)
    return Deviations(
        loss=_relative(loss, expected.losses),
        grad_norm=max(_relative(norm, expected.grad_norms) for norm in norms),
        weight=by_tensor[tensor],
        copies=copies,
        tensor=tensor,
    )


def assemble(runs: Sequence[Run]) -> tuple[Mapping[str, Tensor], float]:
    """The global tensors that the ranks hold, and the largest difference between copies of an element."""
    full: dict[str, Tensor] = {}
    copies = 0.0
    for run in runs:
        for name, shape, offset, values in run.boxes:
            target = full.setdefault(name, torch.full(shape, torch.nan, dtype=values.dtype))
            index = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
            known = ~target[index].isnan()
            if known.any():
                copies = max(copies, float((target[index] - values)[known].abs().max()))
            target[index] = values
    holes = [name for name, tensor in full.items() if tensor.isnan().any()]
    assert not holes, f"no rank holds all of {holes}"
    return full, copies


def run_cell(cell: Cell, pool: RankPool, steps: int = STEPS) -> Deviations:
    """Trains ``cell`` in a pool of as many ranks, and compares."""
    assert pool.world_size == cell.world_size
    return compare(pool.run(train, cell, steps), reference(cell.reference, steps))


def _relative(value: Tensor, expected: Tensor) -> float:
    return float(((value - expected).abs() / expected.abs()).max())
