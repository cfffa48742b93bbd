"""What the ranks run in the tests of the parallel layers: each compares with torch's own layer in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_lightning.backends import get_backend
from neuron_lightning.parallel import (
    ColumnParallelLinear,
    GQAQKVColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    collectives,
    parallel_cross_entropy,
)
from neuron_lightning.parallel import mesh as mesh_module
from neuron_lightning.parallel.initialize import load_global
from neuron_lightning.parallel.shards import global_box, local_box
from neuron_lightning.parallel.spec import get_spec
from tests.devices import layout

TOLERANCE = 1e-12
SEQ, BATCH = 8, 3


@contextmanager
def mesh(tp: int):
    with layout(tp) as made:
        yield made


def on_mesh(tp: int, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs ``fn`` with tensor parallelism over ``tp`` ranks."""
    with mesh(tp):
        return fn(*args, **kwargs)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    error = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert error <= TOLERANCE, f"{what}: {error}"


def cut(x: Tensor, dim: int = 0) -> Tensor:
    return collectives.cut(x, collectives.tensor_parallel(), dim)


def check_parameter(param: Tensor, globals_: dict[str, Tensor], what: str) -> None:
    """Compares a local parameter's gradient, partial sums added up, with the gradients of global tensors."""
    tp = collectives.tensor_parallel()
    grad = param.grad.clone()
    spec = get_spec(param, tp.size)
    covered = torch.zeros_like(grad)
    for part in spec.parts:
        box = local_box(grad, part)
        group = mesh_module.current().tensor_subgroup(part.grad_ranks)
        if group is not None:
            total = box.contiguous()
            get_backend().all_reduce(total, group)
            box = total
        local_box(covered, part).fill_(1)
        close(box, global_box(globals_[part.name], part), f"{what} {part.name} gradient")
    assert grad[covered == 0].abs().sum() == 0, "padding got a gradient"


def check_column(gather: bool, sequence: int | None, bias: bool, stride: int, out: int, pad: bool) -> None:
    layer = ColumnParallelLinear(
        6,
        out,
        bias=bias,
        gather_output=gather,
        dtype=torch.float64,
        stride=stride,
        sequence_parallel_enabled=sequence is not None,
        sequence_dimension=sequence,
        pad=pad,
    )
    reference = nn.Linear(6, out, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for i, p in enumerate(reference.parameters()):
            p.copy_(random(*p.shape, seed=i))
    each = out // stride
    for leaf, p in layer.named_parameters():
        full = reference.get_parameter(leaf).detach()
        load_global(p, lambda part, full=full: full[_part_rows(part.name, each)])
    x = random(*((SEQ, BATCH) if sequence != 1 else (BATCH, SEQ)), 6, seed=7)
    x_ref = x.clone().requires_grad_()
    x_local = (x if sequence is None else cut(x, sequence)).clone().requires_grad_()
    y, y_ref = layer(x_local), reference(x_ref)
    weights = random(*y_ref.shape, seed=9)
    if gather:
        close(y, y_ref, "output")
        (y * weights).sum().backward()
    else:
        spec = layer.weight.shard_spec
        tp = collectives.tensor_parallel()
        loss = y.new_zeros(())
        for j, part in enumerate(spec.parts):
            start = j * each + part.global_offset[0]
            rows = slice(part.local_offset[0], part.local_offset[0] + part.shape[0])
            columns = slice(start, start + part.shape[0])
            close(y[..., rows], y_ref[..., columns], "output")
            loss = loss + (y[..., rows] * weights[..., columns]).sum()
        assert sum(layer.valid_size_per_rank) == out
        assert layer.valid_size_per_rank[tp.rank] == sum(p.shape[0] for p in spec.parts)
        loss.backward()
    (y_ref * weights).sum().backward()
    close(x_local.grad, x_ref.grad if sequence is None else cut(x_ref.grad, sequence), "input gradient")
    for leaf, p in layer.named_parameters():
        full = reference.get_parameter(leaf).grad
        names = [part.name for part in p.shard_spec.parts]
        check_parameter(p, {name: full[_part_rows(name, each)] for name in names}, leaf)


def _part_rows(name: str, each: int) -> slice:
    j = int(name.rpartition("_")[2]) if name else 0
    return slice(j * each, (j + 1) * each)


def check_row(parallel_input: bool, sequence: int | None, bias: bool, size: int, pad: bool) -> None:
    layer = RowParallelLinear(
        size,
        5,
        bias=bias,
        input_is_parallel=parallel_input,
        dtype=torch.float64,
        sequence_parallel_enabled=sequence is not None,
        sequence_dimension=sequence,
        pad=pad,
    )
    reference = nn.Linear(size, 5, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for i, p in enumerate(reference.parameters()):
            p.copy_(random(*p.shape, seed=i))
    for leaf, p in layer.named_parameters():
        full = reference.get_parameter(leaf).detach()
        load_global(p, lambda part, full=full: full)
    x = random(*((SEQ, BATCH) if sequence != 1 else (BATCH, SEQ)), size, seed=7)
    x_ref = x.clone().requires_grad_()
    padded = F.pad(x, (0, layer.padding), value=3.0)
    x_local = (cut(padded, -1) if parallel_input else x).clone().requires_grad_()
    y, y_ref = layer(x_local), reference(x_ref)
    weights = random(*y_ref.shape, seed=9)
    close(y, y_ref if sequence is None else cut(y_ref, sequence), "output")
    (y * (weights if sequence is None else cut(weights, sequence))).sum().backward()
    (y_ref * weights).sum().backward()
    expected = cut(F.pad(x_ref.grad, (0, layer.padding)), -1) if parallel_input else x_ref.grad
    close(x_local.grad, expected, "input gradient")
    for leaf, p in layer.named_parameters():
        check_parameter(p, {"": reference.get_parameter(leaf).grad}, leaf)


def check_embedding(
    sequence: int | None, across: bool, vocab: int, dim: int, pad: bool, padding_idx: int | None
) -> None:
    layer = ParallelEmbedding(
        vocab,
        dim,
        padding_idx=padding_idx,
        dtype=torch.float64,
        shard_across_embedding=across,
        pad=pad,
        sequence_parallel_enabled=sequence is not None,
        sequence_dimension=sequence,
    )
    reference = nn.Embedding(vocab, dim, padding_idx=padding_idx, dtype=torch.float64)
    with torch.no_grad():
        reference.weight.copy_(random(vocab, dim))
    load_global(layer.weight, lambda part: reference.weight.detach())
    ids = torch.randint(vocab, (BATCH, SEQ), generator=torch.Generator().manual_seed(3))
    ids[0, 0] = ids[1, 3] = vocab - 1
    if padding_idx is not None:
        ids[0, 1] = padding_idx % vocab
    y, y_ref = layer(ids), reference(ids)
    if sequence == 0:
        y_ref = y_ref.transpose(0, 1)
    weights = random(*y_ref.shape, seed=9)
    close(y, y_ref if sequence is None else cut(y_ref, sequence), "output")
    (y * (weights if sequence is None else cut(weights, sequence))).sum().backward()
    (y_ref * weights).sum().backward()
    check_parameter(layer.weight, {"": reference.weight.grad}, "table")


def check_qkv(gather: bool, sequence: bool, bias: bool, kv_heads: int, multiplier: int, fuse: bool) -> None:
    heads, width = 4, 2
    sizes = {"q": heads * width, "k": kv_heads * width, "v": kv_heads * width}
    layer = GQAQKVColumnParallelLinear(
        6,
        [sizes["q"], sizes["k"]],
        bias=bias,
        gather_output=gather,
        dtype=torch.float64,
        sequence_parallel_enabled=sequence,
        kv_size_multiplier=multiplier,
        fuse_qkv=fuse,
    )
    leaves = ["weight", "bias"] if bias else ["weight"]
    expected_names = (
        {f"{leaf}_qkv" for leaf in leaves} if fuse else {f"{leaf}_{n}" for leaf in leaves for n in sizes}
    )
    assert {name for name, _ in layer.named_parameters()} == expected_names
    full = {
        f"{leaf}_{n}": random(*((size, 6) if leaf == "weight" else (size,)), seed=i).requires_grad_()
        for i, (leaf, n, size) in enumerate((leaf, n, s) for leaf in leaves for n, s in sizes.items())
    }
    for _, p in layer.named_parameters():
        load_global(p, lambda part: full[part.name].detach())
    x = random(SEQ, BATCH, 6, seed=7)
    x_ref = x.clone().requires_grad_()
    x_local = (cut(x) if sequence else x).clone().requires_grad_()
    tp = collectives.tensor_parallel()
    q, k, v = layer(x_local)
    q_ref, k_ref, v_ref = (
        F.linear(x_ref, full[f"weight_{n}"], full[f"bias_{n}"] if bias else None) for n in sizes
    )
    if gather:
        for name, got, want in (("q", q, q_ref), ("k", k, k_ref), ("v", v, v_ref)):
            close(got, want, name)
        heads_here = slice(0, heads)
        kv_of = [h // (heads // kv_heads) for h in range(heads)]
    else:
        per = heads // tp.size
        heads_here = slice(tp.rank * per, (tp.rank + 1) * per)
        first = (tp.rank // multiplier) * (kv_heads * multiplier // tp.size)
        kv_of = [h // (heads // kv_heads) - first for h in range(heads_here.start, heads_here.stop)]
        close(q, q_ref[..., heads_here.start * width : heads_here.stop * width], "q")
    # Each query head meets its key-value head: the gradients depend on the right ones being together.
    split = lambda t: t.unflatten(-1, (-1, width))
    kv_ref = [h // (heads // kv_heads) for h in range(heads)]
    weights = random(SEQ, BATCH, heads, width, seed=9)
    mixed = split(q) * split(k)[..., kv_of, :] + split(v)[..., kv_of, :] ** 2
    mixed_ref = split(q_ref) * split(k_ref)[..., kv_ref, :] + split(v_ref)[..., kv_ref, :] ** 2
    (mixed * weights[..., heads_here, :]).sum().backward()
    (mixed_ref * weights).sum().backward()
    close(x_local.grad, cut(x_ref.grad) if sequence else x_ref.grad, "input gradient")
    for name, p in layer.named_parameters():
        check_parameter(p, {n: t.grad for n, t in full.items()}, name)


def check_loss(smoothing: float, vocab: int, padded: int, dtype: torch.dtype) -> None:
    tp = collectives.tensor_parallel()
    full = F.pad(random(5, 7, vocab) * 4, (0, padded - vocab), value=50.0).to(dtype)
    target = torch.randint(vocab, (5, 7), generator=torch.Generator().manual_seed(1))
    target[0, 0] = target[4, 3] = -100
    local = cut(full, -1).clone().requires_grad_()
    reference = full[..., :vocab].clone().requires_grad_()
    loss = parallel_cross_entropy(local, target, label_smoothing=smoothing, vocab_size=vocab)
    wide = reference.to(torch.promote_types(dtype, torch.float32))
    expected = F.cross_entropy(
        wide.flatten(0, 1), target.flatten(), label_smoothing=smoothing, reduction="none"
    ).view(5, 7)
    weights = random(5, 7, seed=2).to(loss.dtype)
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    grad = cut(F.pad(reference.grad, (0, padded - vocab)), -1)
    assert loss.dtype == wide.dtype
    assert local.grad.dtype == dtype
    if dtype == torch.float64:
        close(loss, expected, "loss")
        close(local.grad, grad, "logits gradient")
    else:
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(local.grad, grad, rtol=2e-2, atol=1e-4)
    assert tp.size * local.shape[-1] == padded


def check_bad_target_is_nan() -> list[bool]:
    tp = collectives.tensor_parallel()
    logits = cut(random(3, 8), -1)
    assert tp.size > 1
    return parallel_cross_entropy(logits, torch.tensor([1, 8, -1])).isnan().tolist()
