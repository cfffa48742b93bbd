"""What ranks do for the resharding row: train under one layout and save, resume under another, run on.

Four models. Between them: grouped-query attention with fewer key/value heads than tensor-parallel ranks, fused
q/k/v and gate/up, tied and untied heads, a vocabulary that no layout divides, bf16 weights with fp32 masters, and
a module of plain torch layers that a plan cuts, with odd sizes, a scalar parameter and a buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuron_lightning import checkpoint
from neuron_lightning.checkpoint import boxes
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM
from neuron_lightning.optim import ParallelOptimizer
from neuron_lightning.parallel import mesh, parallel_state, parallelize
from neuron_lightning.parallel.initialize import deferred_init, materialize

KINDS = ("llama64", "tied32", "bf16", "plain64")
DTYPES = {"llama64": torch.float64, "tied32": torch.float32, "bf16": torch.bfloat16, "plain64": torch.float64}
BEFORE, AFTER, OWN = 3, 20, 5
BATCH, LENGTH, VOCAB = 8, 16, 61
DECAY = 0.98
PLAN = {"embed": "embedding", "up": "column", "down": "row"}

Held = list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]


@dataclass(frozen=True, order=True)
class Layout:
    """How ranks share a training."""

    tp: int
    dp: int
    zero1: bool
    sp: bool

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tp * self.dp

    def __str__(self) -> str:
        return f"tp{self.tp}dp{self.dp}" + "z" * self.zero1 + "s" * self.sp


def layouts() -> list[Layout]:
    """Every layout of one, two and four ranks; sequence parallel needs tp > 1."""
    sizes = ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1))
    switch = (False, True)
    return [Layout(tp, dp, z, s) for tp, dp in sizes for z in switch for s in switch if tp > 1 or not s]


@dataclass(frozen=True)
class State:
    """What one rank holds, in global terms.

    Attributes:
        boxes: weights, master weights and moments: name, global shape, offset, values.
        scalars: numbers of the optimizer's state by parameter, such as its step.
        options: hyper-parameters of the parameter groups.
    """

    boxes: Held
    scalars: dict[str, dict[str, float]]
    options: list[dict[str, Any]]


@dataclass(frozen=True)
class Series:
    """Losses (this rank's) and gradient norms by step."""

    losses: Tensor
    norms: Tensor


class Plain(nn.Module):
    """Torch's own layers, of sizes that nothing divides where a plan allows it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 7)
        self.head = nn.Linear(7, 3, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.linspace(-1, 1, 7))

    def forward(self, ids: Tensor) -> Tensor:
        """A mean square, so that every parameter has a gradient."""
        hidden = self.down(torch.tanh(self.up(self.norm(self.embed(ids)))))
        out: Tensor = self.head((hidden + self.shift) * self.scale)
        target = (ids.unsqueeze(-1) % torch.arange(2, 5)).to(out.dtype)
        return (out - target).square().mean()


def _llama(kind: str, seed: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2 if kind == "llama64" else 1,
        num_attention_heads=8,
        num_key_value_heads=1 if kind == "tied32" else 2,
        max_position_embeddings=LENGTH,
        initializer_range=0.15,
        tie_word_embeddings=kind == "tied32",
        pad_vocab=True,
    )
    with deferred_init():
        model = LlamaForCausalLM(config)
    materialize(model, seed)
    return model


def build(kind: str, layout: Layout, seed: int) -> tuple[nn.Module, ParallelOptimizer]:
    """The model of ``kind`` on the current mesh, and its optimizer."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[kind])
    try:
        if kind == "plain64":
            torch.manual_seed(seed)
            model: nn.Module = Plain()
            if layout.tp > 1:
                parallelize(model, PLAN)
        else:
            model = _llama(kind, seed)
    finally:
        torch.set_default_dtype(before)
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    inner = torch.optim.AdamW(groups, lr=2e-3 * (1 + seed), betas=(0.9, 0.95))
    narrow = DTYPES[kind] == torch.bfloat16
    optimizer = ParallelOptimizer(
        inner, zero1=layout.zero1, max_grad_norm=1.0, master_weights=narrow, fp32_grad_accumulation=narrow
    )
    return model, optimizer


def train(kind: str, model: nn.Module, optimizer: ParallelOptimizer, first: int, count: int) -> Series:
    """Steps ``first`` to ``first + count - 1``: each on a global batch of its own, and with a falling rate."""
    layout = mesh.current()
    losses, norms = [], []
    for step in range(first, first + count):
        random = torch.Generator().manual_seed(step)
        ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=random)
        ids = ids.chunk(layout.sizes["dp"])[layout.coordinates["dp"]]
        loss = model(ids) if kind == "plain64" else model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
        norms.append(optimizer.grad_norm.double().clone())  # type: ignore[union-attr]
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] *= DECAY
    return Series(torch.stack(losses), torch.stack(norms))


def held(model: nn.Module, optimizer: ParallelOptimizer) -> State:
    """All that this rank holds, by global name and place."""
    tp = mesh.current().sizes["tp"]
    names = {id(p): name for name, p in reversed(list(model.named_parameters()))}
    found: Held = []
    scalars: dict[str, dict[str, float]] = {}
    for name, param in model.named_parameters():
        for place in boxes.placements(name, param, tp):
            values = boxes.view(param.detach(), place.local).clone()
            found.append((f"model/{place.name}", place.global_shape, place.box.offset, values))
    for piece in optimizer.export_state():
        shape, name = tuple(piece.param.shape), names[id(piece.param)]
        for place in boxes.flat_placements(name, piece.param, tp, piece.start, piece.stop):
            scalars[place.name] = dict(piece.scalars)
            for key, flat in piece.tensors.items():
                values = boxes.flat_view(flat.detach(), piece.start, shape, place.local).clone()
                found.append((f"{key}/{place.name}", place.global_shape, place.box.offset, values))
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return State(found, scalars, options)


def save(path: str, form: str, model: nn.Module, optimizer: ParallelOptimizer) -> None:
    """One checkpoint of ours."""
    checkpoint.write_checkpoint(
        path,
        module_state=model.state_dict(),
        parameters=dict(model.named_parameters()),
        optimizers=[optimizer],
        trainer_state={"global_step": BEFORE, "epoch": 0},
        rank_state={"rank": dist.get_rank() if dist.is_initialized() else 0},
        state_dict_type=form,
    )


def load(path: str, model: nn.Module, optimizer: ParallelOptimizer) -> None:
    """Weights and optimizer state back, in place."""
    named = dict(model.named_parameters())
    checkpoint.load_module_state(path, model.state_dict(), named)
    checkpoint.load_optimizer_state(path, [optimizer], named)


@contextmanager
def laid_out(layout: Layout) -> Iterator[None]:
    """A mesh of this layout for a while."""
    parallel_state.initialize_model_parallel(layout.tp, sequence_parallel=layout.sp)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def rank_writes(kind: str, layout: Layout, form: str, path: str) -> State:
    """Trains a few steps and saves. Returns what was in memory."""
    with laid_out(layout):
        model, optimizer = build(kind, layout, seed=0)
        train(kind, model, optimizer, 0, BEFORE)
        state = held(model, optimizer)
        save(path, form, model, optimizer)
        return state


def rank_resumes(kind: str, layout: Layout, path: str, own: str) -> tuple[State, Series, Series]:
    """Loads ``path`` into a fresh model, saves that as ``own``, and trains on.

    Returns:
        What is in memory after the load; the steps after it; the first steps of a third model, already trained on
        something else, that loaded ``own``: the layout's own checkpoint of the same step.
    """
    with laid_out(layout):
        model, optimizer = build(kind, layout, seed=1)
        load(path, model, optimizer)
        state = held(model, optimizer)
        save(own, "deduped", model, optimizer)
        resharded = train(kind, model, optimizer, BEFORE, AFTER)
        other, other_optimizer = build(kind, layout, seed=2)
        train(kind, other, other_optimizer, 1000, 1)
        load(own, other, other_optimizer)
        return state, resharded, train(kind, other, other_optimizer, BEFORE, OWN)


def rank_runs_through(kind: str, layout: Layout) -> Series:
    """The uninterrupted run of a layout: its steps after the save."""
    with laid_out(layout):
        model, optimizer = build(kind, layout, seed=0)
        train(kind, model, optimizer, 0, BEFORE)
        return train(kind, model, optimizer, BEFORE, AFTER)
