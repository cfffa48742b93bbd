"""What the parallel layers, the loss and plans refuse, with rule, numbers and remedy."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neuron_lightning.errors import ConfigError, ParallelStateError
from neuron_lightning.parallel import (
    ColumnParallelLinear,
    GQAQKVColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    apply_activation_checkpointing,
    clip_grad_norm,
    deferred_init,
    materialize,
    parallel_cross_entropy,
    parallelize,
)
from neuron_lightning.parallel import mesh as mesh_module
from neuron_lightning.parallel.initialize import is_undrawn
from neuron_lightning.parallel.mesh import AXES, Mesh


@pytest.fixture
def tp4(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mesh of four ranks as rank 1 sees it, without communication."""
    mesh = Mesh(
        sizes=dict.fromkeys(AXES, 1) | {"tp": 4},
        coordinates=dict.fromkeys(AXES, 0) | {"tp": 1},
        rank=1,
        world_size=4,
    )
    monkeypatch.setattr(mesh_module._Holder, "mesh", mesh)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ColumnParallelLinear(4, 10), r"output_size 10 is not divisible .* size 4.*pads it to 12"),
        (lambda: ColumnParallelLinear(4, 10, stride=3), r"output_size 10 .* stride 3"),
        (lambda: ColumnParallelLinear(4, 8, keep_master_weight=True), "keep_master_weight.*master weights"),
        (lambda: RowParallelLinear(6, 4), r"input_size 6 is not divisible .* 4"),
        (lambda: RowParallelLinear(8, 4, stride=2), "stride 1 only, not 2"),
        (lambda: RowParallelLinear(8, 4, sequence_parallel_enabled=True), "input_is_parallel=True"),
        (lambda: RowParallelLinear(8, 4, reduce_output=False), "bias=False or skip_bias_add"),
        (lambda: ParallelEmbedding(10, 4), r"num_embeddings 10 .*pad=True"),
        (lambda: ParallelEmbedding(8, 6, shard_across_embedding=True), r"embedding_dim 6"),
        (lambda: ParallelEmbedding(8, 4, max_norm=1.0), "max_norm"),
        (lambda: ParallelEmbedding(8, 4, sparse=True), "sparse"),
        (lambda: ParallelEmbedding(8, 4, padding_idx=8), r"padding_idx 8 .* vocabulary of 8"),
        (lambda: GQAQKVColumnParallelLinear(4, [8, 2]), r"key-value size .* 2 is not divisible .* 4"),
        (lambda: GQAQKVColumnParallelLinear(4, [6, 4]), r"query size .* 6"),
        (
            lambda: GQAQKVColumnParallelLinear(4, [8, 4], kv_size_multiplier=3),
            r"multiplier 3 does not divide",
        ),
        (lambda: GQAQKVColumnParallelLinear(4, [8, 4, 4]), r"3 entries"),
        (lambda: ColumnParallelLinear(4, 8, tensor_model_parallel_group=object()), "leave the argument out"),
    ],
)
def test_layers_refuse(tp4: None, make, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        make()


def test_local_shapes_and_attributes(tp4: None) -> None:
    column = ColumnParallelLinear(4, 10, stride=2, pad=True)
    assert column.weight.shape == (4, 4)
    assert column.valid_size_per_rank == (4, 4, 2, 0)
    assert column.padding == 6
    assert [p.name for p in column.weight.shard_spec.parts] == ["weight_0", "weight_1"]
    assert column.weight.shard_spec.parts[1].global_offset == (2, 0)
    assert column.weight.tensor_model_parallel
    assert (column.weight.partition_dim, column.weight.partition_stride, column.weight.num_partitions) == (
        0,
        2,
        4,
    )
    qkv = GQAQKVColumnParallelLinear(4, [8, 2], kv_size_multiplier=4)
    assert qkv.weight_qkv.shape == (6, 4)
    assert [(p.name, p.replicas, p.grad_ranks) for p in qkv.weight_qkv.shard_spec.parts] == [
        ("weight_q", 1, 1),
        ("weight_k", 4, 4),
        ("weight_v", 4, 4),
    ]
    row = RowParallelLinear(8, 4, input_is_parallel=True, sequence_parallel_enabled=True)
    assert row.bias.sequence_parallel_enabled
    assert row.weight.partition_dim == 1


def test_a_layer_of_another_mesh_says_so(tp4: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ColumnParallelLinear(4, 8)
    monkeypatch.setattr(mesh_module._Holder, "mesh", None)
    with pytest.raises(
        ParallelStateError, match="built for tensor-parallel size 4, but the current mesh has 1"
    ):
        layer(torch.zeros(2, 4))


def test_one_rank_is_nn_linear_and_nn_embedding() -> None:
    x = torch.randn(3, 4)
    column, row = ColumnParallelLinear(4, 6), RowParallelLinear(4, 6)
    assert torch.equal(column(x), F.linear(x, column.weight, column.bias))
    assert torch.equal(row(x), F.linear(x, row.weight, row.bias))
    ids = torch.tensor([[0, 1, 2]])
    embed = ParallelEmbedding(3, 4)
    assert torch.equal(embed(ids), F.embedding(ids, embed.weight))
    sequence_first = ParallelEmbedding(3, 4, sequence_parallel_enabled=True)
    assert sequence_first(ids).shape == (3, 1, 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_of_one_rank(smoothing: float) -> None:
    logits = torch.randn(4, 5, 11, dtype=torch.float64, requires_grad=True)
    target = torch.randint(11, (4, 5))
    target[1, 2] = 3 - 10
    loss = parallel_cross_entropy(logits, target, smoothing, ignore_index=-7)
    expected = F.cross_entropy(
        logits.flatten(0, 1), target.flatten(), label_smoothing=smoothing, ignore_index=-7, reduction="none"
    )
    torch.testing.assert_close(loss.flatten(), expected, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(
        lambda x: parallel_cross_entropy(x, target, smoothing, ignore_index=-7), logits
    )


def test_loss_with_masked_logits() -> None:
    logits = torch.randn(2, 5).index_fill(1, torch.tensor([3]), float("-inf")).requires_grad_()
    loss = parallel_cross_entropy(logits, torch.tensor([0, 4]))
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([0, 4]), reduction="none"))
    loss.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": torch.zeros(3, dtype=torch.long)}, r"\(2, 4\).*\(3,\)"),
        ({"label_smoothing": 1.5}, "between 0 and 1, not 1.5"),
        ({"vocab_size": 5}, "vocab_size 5 does not fit logits of 4 columns"),
    ],
)
def test_loss_refuses(arguments, message: str) -> None:
    given = {
        "vocab_parallel_logits": torch.zeros(2, 4),
        "target": torch.zeros(2, dtype=torch.long),
    } | arguments
    with pytest.raises(ConfigError, match=message):
        parallel_cross_entropy(**given)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"layers.*.0": "colum"}, r"unknown style 'colum'.*column_gather.*colwise"),
        ({"layer.*.0": "column"}, r"'layer\.\*\.0' .* matches no module.*similar names: layers"),
        ({"layers.*.1": "row"}, r"'layers\.0\.1' is a Tanh"),
        ({"embed": "column"}, r"'embed' is a Embedding"),
        ({"layers.*.0": "column", "layers.1.*": "row"}, r"'layers\.1\.\d' "),
        ({"embed": "embedding"}, r"'head\.weight' is tied to a parameter that the tensor-parallel plan cuts"),
    ],
)
def test_plans_refuse(plan: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        parallelize(Model(), plan)


def test_a_plan_is_applied_once_and_ties_survive() -> None:
    model = Model()
    weights = model.embed.weight.detach().clone()
    parallelize(model, {"head": "column_gather", "layers.*.0": "replicated"})
    assert isinstance(model.embed, ParallelEmbedding)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, weights)
    with pytest.raises(ConfigError, match="applied to this Model already"):
        parallelize(model, {"head": "column"})


def test_a_model_without_a_plan_needs_one() -> None:
    with pytest.raises(ConfigError, match="ships no tensor-parallel plan"):
        parallelize(Model())


def test_ties_that_are_cut_in_two_ways(tp4: None) -> None:
    with pytest.raises(ConfigError, match="tied layers must be cut alike"):
        parallelize(Model(), {"embed": "embedding_dim", "head": "column"})


def test_layers_that_do_not_divide_are_named(tp4: None) -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 6)})
    with pytest.raises(ConfigError, match=r"'a' cannot be cut as 'row': input_size 6"):
        parallelize(model, {"a": "row"})


def test_clipping_refuses() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.clip_grad_norm"):
        clip_grad_norm([torch.zeros(2)], 1.0, zero1_optimizer=True)
    with pytest.raises(ConfigError, match="norm_type must be positive"):
        clip_grad_norm([torch.zeros(2)], 1.0, norm_type=0)
    assert clip_grad_norm([torch.zeros(2)], 1.0).item() == 0.0


def test_activation_checkpointing_keeps_names_and_classes() -> None:
    model = Model()
    names = [name for name, _ in model.named_parameters()]
    assert apply_activation_checkpointing(model, nn.Sequential) == 2
    assert [name for name, _ in model.named_parameters()] == names
    assert isinstance(model.layers[0], nn.Sequential)
    assert type(model.layers[0]).__name__ == "Sequential"
    twin = copy.deepcopy(model)
    x = torch.randn(3, 4, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = twin.layers[0](x)
    assert all(t.data_ptr() == x.data_ptr() for t in saved)
    y.sum().backward()
    assert twin.layers[0][0].weight.grad is not None
    assert model.layers[0][0].weight.grad is None
    with torch.no_grad():
        assert torch.equal(twin.layers[0](x), model.layers[0](x))


@pytest.mark.parametrize("what", ["some", nn.Conv1d, 3])
def test_activation_checkpointing_refuses(what) -> None:
    with pytest.raises(ConfigError, match=r"activation.checkpoint"):
        apply_activation_checkpointing(Model(), what)


def test_a_state_dict_of_a_parallel_layer_pickles() -> None:
    layer = ColumnParallelLinear(4, 6)
    again = pickle.loads(pickle.dumps(layer.state_dict()))
    assert torch.equal(again["weight"], layer.weight)


@pytest.mark.parametrize("how", ["deepcopy", "to_empty", "assign", "to"])
def test_a_replaced_parameter_keeps_its_marks(tp4: None, how: str) -> None:
    layer = ColumnParallelLinear(4, 8, device="meta" if how in ("to_empty", "assign") else None)
    spec, record = layer.weight.shard_spec, layer.weight.init_record
    if how == "deepcopy":
        original, layer = layer, copy.deepcopy(layer)
        assert layer.weight is not original.weight
        assert torch.equal(layer.weight, original.weight)
    elif how == "to_empty":
        layer.to_empty(device="cpu")
        assert is_undrawn(layer.weight)
    elif how == "assign":
        layer.load_state_dict({"weight": torch.ones(2, 4), "bias": torch.ones(2)}, assign=True)
        assert not is_undrawn(layer.weight)
    else:
        layer.to(torch.bfloat16)
        assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.shard_spec == spec
    assert layer.weight.init_record is record
    assert layer.weight.partition_dim == 0


def test_loaded_weights_are_never_redrawn() -> None:
    with deferred_init():
        layer = ColumnParallelLinear(4, 8)
    layer.load_state_dict({"weight": torch.ones(8, 4)}, strict=False)
    assert materialize(layer, seed=0) == ["bias"]
    assert (layer.weight == 1).all()


def test_ties_survive_a_deep_copy() -> None:
    model = nn.ModuleDict({"embed": ParallelEmbedding(8, 4), "head": ColumnParallelLinear(4, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    twin = copy.deepcopy(model)
    assert twin["head"].weight is twin["embed"].weight
    assert twin["head"].weight is not model["head"].weight
    assert twin["head"].weight.shard_spec == model["head"].weight.shard_spec
