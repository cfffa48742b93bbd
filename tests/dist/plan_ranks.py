"""What the ranks run in the tests of plans, clipping, randomness, checkpointing and compilation."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_lightning.backends import get_backend
from neuron_lightning.parallel import (
    ColumnParallelLinear,
    GQAQKVColumnParallelLinear,
    RowParallelLinear,
    allreduce_partial_grads,
    apply_activation_checkpointing,
    clip_grad_norm,
    collectives,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    get_rng_tracker,
    materialize,
    model_parallel_manual_seed,
    parallelize,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from neuron_lightning.parallel import mesh as mesh_module
from neuron_lightning.parallel.random import get_rng_state, set_rng_state
from neuron_lightning.parallel.shards import global_box, local_box
from neuron_lightning.parallel.spec import get_spec
from tests.dist.layer_ranks import close, cut, mesh, random


def compare(parallel: nn.Module, reference: nn.Module) -> None:
    """Every local gradient against its box of the reference's."""
    expected = dict(reference.named_parameters())
    for name, param in parallel.named_parameters():
        for part in get_spec(param, mesh_module.current().sizes["tp"]).parts:
            close(local_box(param.grad, part), global_box(expected[name].grad, part), name)


# -- plans ---------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(2)
        )
        self.head = nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(x)


MLP_PLAN = {"blocks.*.up": "column", "blocks.*.down": "row", "head": "column_gather", "norm": "replicated"}


def check_mlp() -> None:
    torch.manual_seed(0)
    reference = Mlp().double()
    reference.blocks[0]["up"].bias.requires_grad_(False)
    model = parallelize(copy.deepcopy(reference), MLP_PLAN)
    assert isinstance(model.blocks[1]["up"], ColumnParallelLinear)
    assert isinstance(model.blocks[1]["down"], RowParallelLinear)
    assert not model.blocks[0]["up"].bias.requires_grad
    assert model._nl_tp_plan_applied == MLP_PLAN
    reference.blocks[0]["up"].bias.requires_grad_(True)
    model.blocks[0]["up"].bias.requires_grad_(True)
    x = random(3, 4, 6)
    y, y_ref = model(x), reference(x)
    close(y, y_ref, "output")
    weights = random(*y.shape, seed=1)
    (y * weights).sum().backward()
    (y_ref * weights).sum().backward()
    compare(model, reference)


def check_mlp_sequence_parallel() -> None:
    torch.manual_seed(0)
    reference = Mlp().double()
    plan = MLP_PLAN | {"norm": "sequence"}
    model = parallelize(copy.deepcopy(reference), plan, sequence_parallel=True)
    x = random(8, 3, 6)
    y, y_ref = model(cut(x)), reference(x)
    close(y, y_ref, "output")
    weights = random(*y.shape, seed=1)
    (y * weights).sum().backward()
    (y_ref * weights).sum().backward()
    allreduce_partial_grads(model.parameters())
    compare(model, reference)


def check_mlp_on_meta() -> dict[str, Any]:
    with torch.device("meta"):
        model = parallelize(Mlp(), MLP_PLAN)
    drawn = materialize(model, seed=3)
    assert set(drawn) == {name for name, _ in model.named_parameters()}
    return {
        name: [(p.name, p.global_offset, local_box(t.detach(), p)) for p in get_spec(t, 1).parts]
        for name, t in model.named_parameters()
    }


def check_hugging_face(tie: bool, kind: str) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=33,  # odd on purpose: the head and the embedding are padded inside
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=32,
        tie_word_embeddings=tie,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    reference = getattr(transformers, f"{kind}ForCausalLM")(config).double()
    model = parallelize(copy.deepcopy(reference))
    if tie:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.randint(33, (2, 9), generator=torch.Generator().manual_seed(1))
    out, out_ref = model(input_ids=ids, labels=ids), reference(input_ids=ids, labels=ids)
    close(out.logits, out_ref.logits, "logits")
    out.loss.backward()
    out_ref.loss.backward()
    allreduce_partial_grads(model.parameters())
    compare(model, reference)


# -- clipping ------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Replicated key-value rows, a sharded and a replicated parameter."""

    def __init__(self, multiplier: int, sequence: bool) -> None:
        super().__init__()
        kind = {"dtype": torch.float64}
        self.norm = nn.LayerNorm(6, **kind)
        for p in self.norm.parameters():
            p.sequence_parallel_enabled = sequence
        self.qkv = GQAQKVColumnParallelLinear(
            6,
            [8, 2],
            gather_output=False,
            kv_size_multiplier=multiplier,
            sequence_parallel_enabled=sequence,
            **kind,
        )
        self.out = RowParallelLinear(8, 6, input_is_parallel=True, sequence_parallel_enabled=sequence, **kind)
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x))  # one key-value head of width 2
        heads = torch.unflatten(q, -1, (-1, 2)) * k.unsqueeze(-2) + v.unsqueeze(-2)
        return self.out(heads.flatten(-2))


def clip(tp: int, multiplier: int, sequence: bool, norm_type: float, max_norm: float) -> Any:
    """Norm, and the clipped gradients of everything by (name, offset)."""
    with mesh(tp):
        model_parallel_manual_seed(0)
        model = Mixed(multiplier, sequence)
        x = random(8, 3, 6)
        y = model(cut(x) if sequence and tp > 1 else x)
        weights = random(8, 3, 6, seed=1)
        (y * (cut(weights) if sequence and tp > 1 else weights)).sum().backward()
        allreduce_partial_grads(model.parameters())
        norm = clip_grad_norm(model.parameters(), max_norm, norm_type)
        found = {}
        for name, p in model.named_parameters():
            for part in get_spec(p, tp).parts:
                if p.grad is not None:
                    leaf = f"{name.rpartition('.')[0]}.{part.name}" if part.name else name
                    found[leaf, part.global_offset] = local_box(p.grad, part)
        return norm, found


def clip_by_torch(norm_type: float, max_norm: float) -> Any:
    """The same model on one rank, by torch's own clipping."""
    with mesh(1):
        model_parallel_manual_seed(0)
        model = Mixed(1, False)
        x, weights = random(8, 3, 6), random(8, 3, 6, seed=1)
        (model(x) * weights).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, norm_type)
        found: dict[str, Tensor] = {}
        for name, p in model.named_parameters():
            for part in get_spec(p, 1).parts:
                if p.grad is not None:
                    leaf = f"{name.rpartition('.')[0]}.{part.name}" if part.name else name
                    found[leaf] = local_box(p.grad, part)
        return norm, found


# -- collectives ---------------------------------------------------------------------------------------


def check_regions() -> None:
    """Each region's forward by hand; backward by the rule <f(x), y> summed over ranks = <x, f'(y)>."""
    tp = collectives.tensor_parallel()
    same, mine = random(4, 8, seed=1), random(4, 8, seed=2 + tp.rank)
    everyone = [random(4, 8, seed=2 + r) for r in range(tp.size)]
    total = torch.stack(everyone).sum(0)
    n = tp.size

    def run(fn, x, grad):
        x = x.clone().requires_grad_()
        y = fn(x)
        y.backward(grad)
        return y.detach(), x.grad

    y, g = run(copy_to_tensor_model_parallel_region, same, mine)
    close(y, same, "copy")
    close(g, total, "copy gradient")
    y, g = run(reduce_from_tensor_model_parallel_region, mine, same)
    close(y, total, "reduce")
    close(g, same, "reduce gradient")
    for dim in (-1, 0):
        part = same.chunk(n, dim)[tp.rank]
        y, g = run(lambda t, d=dim: scatter_to_tensor_model_parallel_region(t, d), same, part)
        close(y, part, "scatter")
        close(g, same, "scatter gradient")
        y, g = run(lambda t, d=dim: gather_from_tensor_model_parallel_region(t, d), part, same)
        close(y, same, "gather")
        close(g, part, "gather gradient")
    for dim in (0, 1):
        part = same.chunk(n, dim)[tp.rank]
        y, g = run(lambda t, d=dim: scatter_to_sequence_parallel_region(t, d), same, part)
        close(y, part, "scatter to sequence")
        close(g, same, "scatter to sequence gradient")
        y, g = run(lambda t, d=dim: gather_from_sequence_parallel_region(t, d), part, mine)
        close(y, same, "gather from sequence")
        close(g, total.chunk(n, dim)[tp.rank], "gather from sequence gradient")
        y, g = run(lambda t, d=dim: gather_from_sequence_parallel_region(t, d, False), part, same)
        close(g, part, "gather from sequence gradient, not model parallel")
        y, g = run(lambda t, d=dim: reduce_scatter_to_sequence_parallel_region(t, d), mine, part)
        close(y, total.chunk(n, dim)[tp.rank], "reduce-scatter")
        close(g, same, "reduce-scatter gradient")


# -- details of the layers -----------------------------------------------------------------------------


def check_partial_and_skipped_bias() -> None:
    row = RowParallelLinear(
        8, 5, input_is_parallel=True, reduce_output=False, skip_bias_add=True, dtype=torch.float64
    )
    x = random(3, 8)
    partial, bias = row(cut(x, -1))
    assert bias is row.bias
    close(partial, F.linear(cut(x, -1), row.weight), "partial sum")
    column = ColumnParallelLinear(8, 16, skip_bias_add=True, stride=2, dtype=torch.float64)
    y, bias = column(x)
    whole = ColumnParallelLinear(8, 16, stride=2, dtype=torch.float64)
    with torch.no_grad():
        whole.weight.copy_(column.weight)
        whole.bias.copy_(column.bias)
    close(y + bias, whole(x), "bias added by hand")


def check_reduce_dtype(activations: torch.dtype, reduce_dtype: torch.dtype) -> set[torch.dtype]:
    """The dtypes in which the layers' sums over ranks are formed, forward and backward."""
    backend, seen = get_backend(), set()

    def watch(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.add(tensor.dtype)
        return type(backend).all_reduce(backend, tensor, *args, **kwargs)

    column = ColumnParallelLinear(4, 8, gather_output=False, dtype=activations, reduce_dtype=reduce_dtype)
    row = RowParallelLinear(8, 4, input_is_parallel=True, dtype=activations, reduce_dtype=reduce_dtype)
    x = torch.randn(3, 4, dtype=activations, requires_grad=True)
    backend.all_reduce = watch
    try:
        y = row(column(x))
        y.sum().backward()
    finally:
        del backend.all_reduce
    assert y.dtype == x.grad.dtype == activations
    return seen


def check_autocast(sequence: bool) -> None:
    """Under autocast: outputs and gradients have the dtypes of nn.Linear under autocast."""
    column = ColumnParallelLinear(6, 8, gather_output=False, sequence_parallel_enabled=sequence)
    row = RowParallelLinear(8, 6, input_is_parallel=True, sequence_parallel_enabled=sequence)
    x = torch.randn(4, 3, 6, requires_grad=True)
    with get_backend().autocast(torch.bfloat16):
        hidden = column(x)
        y = row(hidden)
    assert hidden.dtype == y.dtype == torch.bfloat16
    y.float().sum().backward()
    for t in (x, *column.parameters(), *row.parameters()):
        assert t.grad is not None
        assert t.grad.dtype == torch.float32
        assert t.grad.isfinite().all()


def check_frozen_weights() -> None:
    """A frozen weight gets no gradient; the input's is still right."""
    column = ColumnParallelLinear(6, 8, dtype=torch.float64).requires_grad_(False)
    x = random(3, 6).requires_grad_()
    column(x).sum().backward()
    full = gather_from_tensor_model_parallel_region(column.weight, 0)
    close(x.grad, full.sum(0).expand(3, 6), "input gradient")
    assert column.weight.grad is None


class _Block(nn.Module):
    def __init__(self, sequence: bool) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(
            6, 16, gather_output=False, stride=2, sequence_parallel_enabled=sequence
        )
        self.down = RowParallelLinear(8, 6, input_is_parallel=True, sequence_parallel_enabled=sequence)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def check_compile(sequence: bool) -> None:
    """The layers trace without a graph break and compute the same."""
    block = _Block(sequence)
    x = torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(0))
    x = cut(x).clone() if sequence else x
    results = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=False)):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        grads = torch.autograd.grad(y.square().sum(), [leaf, *block.parameters()])
        results.append((y, *grads))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def check_only_the_local_sequence_is_kept() -> int:
    """Elements that a sequence-parallel column layer saves for backward, besides its weight."""
    layer = ColumnParallelLinear(6, 8, bias=False, gather_output=False, sequence_parallel_enabled=True)
    saved: list[Tensor] = []
    x = torch.randn(4, 3, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    return sum(t.untyped_storage().nbytes() // 4 for t in saved if t.data_ptr() != layer.weight.data_ptr())


# -- randomness ----------------------------------------------------------------------------------------


def streams(tp: int) -> dict[str, Any]:
    """Numbers drawn outside, inside two regions, and outside again; and once more from a restored state."""
    with mesh(tp):
        model_parallel_manual_seed(11)
        state = get_rng_state()

        def draw() -> dict[str, Any]:
            out = {"outside": torch.rand(3).tolist()}
            for name in ("first", "second"):
                with get_rng_tracker().fork():
                    out[name] = torch.rand(3).tolist()
            out["after"] = torch.rand(3).tolist()
            return out

        once = draw()
        set_rng_state(state)
        assert draw() == once
        return once


class _Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(6, 8, gather_output=False)
        self.down = RowParallelLinear(8, 6, input_is_parallel=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        with get_rng_tracker().fork():
            hidden = F.dropout(hidden, 0.5, self.training)
        return F.dropout(self.down(hidden), 0.2, self.training)


def check_checkpointing_repeats_dropout() -> None:
    results = []
    for recompute in (False, True):
        model_parallel_manual_seed(0)
        model = nn.Module()
        model.layers = nn.ModuleList(_Dropping() for _ in range(2))
        if recompute:
            assert apply_activation_checkpointing(model, "full") == 2
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = x
        for layer in model.layers:
            y = layer(y)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def check_no_collective_at_one_rank() -> None:
    """With tp=1 no layer, loss or clip calls a collective."""
    backend = get_backend()
    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        setattr(backend, name, _refuse)
    try:
        check_mlp()
        check_hugging_face(True, "Llama")
        model = Mixed(1, True)
        model(random(8, 3, 6)).sum().backward()
        allreduce_partial_grads(model.parameters())
        clip_grad_norm(model.parameters(), 1.0)
    finally:
        for name in ("all_reduce", "all_gather", "reduce_scatter"):
            delattr(backend, name)


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a collective was called at tensor-parallel size 1")
