"""Buckets and padding: few shapes, the same on all ranks, every sample once, and a loss that does not notice."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from neuron_lightning.data import (
    BucketBatchSampler,
    PadToBuckets,
    bucket_length,
    check_buckets,
    powers_of_two_buckets,
)
from neuron_lightning.errors import ConfigError, DataError
from neuron_lightning.lightning import data_position
from neuron_lightning.models.attention_mask import mark_unpadded
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM

BUCKETS = (4, 8, 16)
PINNED = [[8, 14], [4, 6], [11, 15], [16, 2], [18, 0], [13, 10], [9, 12], [1, 3], [5, 7], [17, 19]]

lengths_lists = st.lists(st.integers(0, 16), min_size=1, max_size=120)
layouts = st.tuples(st.integers(1, 4), st.integers(1, 4))  # batch size, ranks


class Tokens(Sequence[dict[str, Any]]):
    """Sample ``i`` has ``lengths[i]`` tokens and knows its number."""

    def __init__(self, lengths: Sequence[int], vocab_size: int = 96) -> None:
        self.lengths, self.vocab_size = list(lengths), vocab_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(1, self.vocab_size, (self.lengths[index],), generator=generator)
        return {"input_ids": ids, "labels": ids.tolist(), "id": index}


def samplers(lengths: Any, batch_size: int, ranks: int, **options: Any) -> list[BucketBatchSampler]:
    options = {"buckets": BUCKETS, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of buckets that drop_last never reads
        return [
            BucketBatchSampler(lengths, batch_size=batch_size, num_replicas=ranks, rank=rank, **options)
            for rank in range(ranks)
        ]


def bucket(lengths: Sequence[int], batch: Sequence[int]) -> int:
    return bucket_length(max(lengths[i] for i in batch), BUCKETS)


def in_order(by_rank: list[BucketBatchSampler]) -> list[int]:
    """Ids in the order in which all ranks together take them, of whole steps."""
    steps = zip(*by_rank, strict=True)
    return [i for batches in steps for place in zip(*batches, strict=True) for i in place]


# Buckets


@given(length=st.integers(0, 5000), minimum=st.integers(1, 600))
def test_bucket_is_the_smallest_that_holds_the_sample(length: int, minimum: int) -> None:
    buckets = powers_of_two_buckets(minimum, 5000)
    found = bucket_length(length, buckets)
    assert found in buckets
    assert found >= length
    assert all(b < length for b in buckets if b < found)
    assert length <= buckets[0] or found < 2 * length


@pytest.mark.parametrize(
    ("minimum", "maximum", "expected"),
    [
        (100, 3000, (128, 256, 512, 1024, 2048, 3000)),
        (128, 512, (128, 256, 512)),
        (1, 1, (1,)),
        (65, 70, (70,)),
    ],
)
def test_powers_of_two_end_in_the_maximum(minimum: int, maximum: int, expected: tuple[int, ...]) -> None:
    assert powers_of_two_buckets(minimum, maximum) == expected


def test_buckets_are_checked() -> None:
    assert check_buckets(np.asarray([8, 16]), multiple_of=8) == (8, 16)
    for wrong in ([], [0, 4], [4, 4], [8, 4], [4.0, 8.0], [True, 2]):
        with pytest.raises(ConfigError, match="positive ints in rising order"):
            check_buckets(wrong)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"multiples of 8, but \[4, 12\] are not: round them up to \[8, 16\]"
    ):
        check_buckets([4, 8, 12], multiple_of=8)
    with pytest.raises(ConfigError, match="multiples of 8"):
        powers_of_two_buckets(16, 100, multiple_of=8)
    with pytest.raises(ConfigError, match="minimum 9, maximum 8"):
        powers_of_two_buckets(9, 8)


def test_too_long_a_sample_is_an_error_or_cut() -> None:
    with pytest.raises(
        ConfigError, match=r"has 17 tokens, and the buckets are \[4, 8, 16\]: .*truncate=True"
    ):
        bucket_length(17, BUCKETS)
    assert bucket_length(17, BUCKETS, truncate=True) == 16
    with pytest.raises(ConfigError, match="is -1"):
        bucket_length(-1, BUCKETS)
    long = {"input_ids": list(range(20)), "labels": list(range(20))}
    batch = PadToBuckets(BUCKETS, pad_token_id=0, truncate=True)([long])
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [list(range(16))]
    assert batch["attention_mask"].tolist() == [[1] * 16]
    with pytest.raises(ConfigError, match="has 20 tokens"):
        PadToBuckets(BUCKETS, pad_token_id=0)([long])
    with pytest.raises(ConfigError, match="but 2 of 3 are, the first of them sample 1 with 17 tokens"):
        samplers([3, 17, 99], 1, 1)
    assert len(samplers([3, 17, 99], 2, 1, truncate=True)[0]) == 2


# Padding


def test_every_entry_is_padded_with_its_own_value() -> None:
    pad = PadToBuckets(BUCKETS, pad_token_id=9, pad_values={"position_ids": 7, "weights": 0.5})
    batch = pad(
        [
            {
                "input_ids": torch.tensor([1, 2], dtype=torch.int32),
                "labels": [1, 2],
                "position_ids": np.asarray([0, 1], dtype=np.uint16),
                "weights": [1.0, 2.0],
                "features": np.ones((2, 3), dtype=np.float64),
                "id": 40,
                "score": np.float32(0.25),
            },
            {
                "input_ids": torch.tensor([3, 4, 5, 6, 7], dtype=torch.int32),
                "labels": (3, -100, 5, 6, 7),
                "position_ids": np.arange(5, dtype=np.uint16),
                "weights": [1.0] * 5,
                "features": np.ones((5, 3), dtype=np.float64),
                "id": 41,
                "score": np.float32(0.75),
            },
        ]
    )
    expected = {
        "input_ids": torch.tensor([[1, 2, 9, 9, 9, 9, 9, 9], [3, 4, 5, 6, 7, 9, 9, 9]], dtype=torch.int32),
        "labels": torch.tensor(
            [[1, 2, -100, -100, -100, -100, -100, -100], [3, -100, 5, 6, 7, -100, -100, -100]]
        ),
        "position_ids": torch.tensor([[0, 1, 7, 7, 7, 7, 7, 7], [0, 1, 2, 3, 4, 7, 7, 7]]),
        "weights": torch.tensor([[1.0, 2, *[0.5] * 6], [*[1.0] * 5, *[0.5] * 3]]),
        "features": torch.zeros(2, 8, 3, dtype=torch.float64),
        "id": torch.tensor([40, 41]),
        "score": torch.tensor([0.25, 0.75]),
        "attention_mask": torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]),
    }
    expected["features"][0, :2] = expected["features"][1, :5] = 1.0
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(batch[key], value, rtol=0, atol=0)


@pytest.mark.parametrize(("option", "has_one"), [("create", True), ("keep", True), ("drop", False)])
def test_a_mask_in_the_samples_is_kept_or_dropped(option: Any, has_one: bool) -> None:
    pad = PadToBuckets([4], pad_token_id=0, attention_mask=option)
    masked = pad([{"input_ids": [1, 2, 3], "attention_mask": np.asarray([False, True, True])}])
    assert ("attention_mask" in masked) is has_one
    if has_one:
        assert masked["attention_mask"].tolist() == [[False, True, True, False]]
        assert masked["attention_mask"].dtype == torch.bool
    assert ("attention_mask" in pad([{"input_ids": [1]}])) is (option == "create")


def test_an_incomplete_batch_is_filled_with_rows_that_have_no_label() -> None:
    batch = PadToBuckets([4], pad_token_id=5, batch_size=3)(
        [{"input_ids": [1, 2], "labels": [1, 2], "id": 8}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 5, 5], [5] * 4, [5] * 4]
    assert batch["labels"].tolist() == [[1, 2, -100, -100], [-100] * 4, [-100] * 4]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [0] * 4, [0] * 4]
    assert batch["id"].tolist() == [8, 0, 0]


def test_samples_that_are_sequences_make_one_tensor() -> None:
    pad = PadToBuckets(BUCKETS, pad_token_id=3, batch_size=3)
    for samples in ([torch.tensor([1, 2]), torch.tensor([4])], [[1, 2], [4]], [np.asarray([1, 2]), [4]]):
        assert pad(samples).tolist() == [[1, 2, 3, 3], [4, 3, 3, 3], [3] * 4]


def test_samples_without_tokens_keep_the_dtype_of_the_others() -> None:
    batch = PadToBuckets(BUCKETS, pad_token_id=0)(
        [{"input_ids": [], "weights": []}, {"input_ids": [1], "weights": [0.5]}]
    )
    assert batch["input_ids"].dtype == torch.int64
    assert batch["weights"].tolist() == [[0.0] * 4, [0.5, 0, 0, 0]]
    assert PadToBuckets(BUCKETS, pad_token_id=2)([{"input_ids": []}])["input_ids"].tolist() == [[2] * 4]


def test_arrays_that_are_read_only_are_read_without_a_warning() -> None:
    ids = np.arange(3, dtype=np.uint16)
    ids.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = PadToBuckets([4], pad_token_id=0)([{"input_ids": ids, "labels": ids}])
    assert batch["labels"].tolist() == [[0, 1, 2, -100]]


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([{"input_ids": [1, 2], "labels": [1]}], r"one length, not \{'input_ids': 2, 'labels': 1\}"),
        ([{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}], "same keys"),
        ([{"input_ids": [1], "text": "a word"}], "'text' holds 'a word'"),
        ([{"input_ids": [1], "text": None}], "'text' holds None"),
        ([{"input_ids": [1]}, [1]], "all be mappings or none, but one is a list"),
        ([torch.tensor([1]), {"input_ids": [1]}], "all be mappings or none, but one is a Tensor"),
        ([{"input_ids": [[1, 2], [3]]}], "'input_ids' holds"),
        ([{"id": 4}], r"numbers only: \['id'\]"),
        ([{"input_ids": [1], "x": 1}, {"input_ids": [1], "x": [1]}], "'x' must have the same shape"),
        ([{"input_ids": [1], "labels": torch.tensor([1], dtype=torch.uint8)}], "padded with -100, which torch.uint8"),
        ([{"input_ids": [True]}], "padded with 9, which torch.bool"),
        ([], "1 to 2 samples, not 0"),
        ([{"input_ids": [1]}] * 3, "1 to 2 samples, not 3"),
    ],
)  # fmt: skip
def test_samples_that_do_not_fit_are_errors(samples: list[Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PadToBuckets(BUCKETS, pad_token_id=9, batch_size=2)(samples)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention_mask": True}, "attention_mask must be"),
        ({"pad_token_id": -1}, "id of the vocabulary, not -1"),
        ({"pad_values": {"input_ids": 1}}, "pad_token_id"),
        ({"batch_size": 0}, "at least 1, not 0"),
        ({"multiple_of": 8}, r"multiples of 8, but \[4\]"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PadToBuckets(BUCKETS, **{"pad_token_id": 0, **options})


# The loss of a model


def llama(num_layers: int = 2) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double()


def loss_and_gradients(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, list[Any]]:
    model.zero_grad()
    loss = model(**{key: value for key, value in batch.items() if key != "id"})[0]
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("option", ["create", "drop"])
def test_loss_and_gradients_are_those_of_the_batch_without_padding(option: Any) -> None:
    model, data = llama(), Tokens([7] * 3)
    samples = [data[i] for i in range(3)]
    plain = {key: torch.stack([torch.as_tensor(s[key]) for s in samples]) for key in ("input_ids", "labels")}
    padded = PadToBuckets(BUCKETS, pad_token_id=0, batch_size=5, attention_mask=option)(samples)
    assert padded["input_ids"].shape == (5, 8)
    torch.testing.assert_close(
        loss_and_gradients(model, padded), loss_and_gradients(model, plain), rtol=1e-10, atol=1e-13
    )


@pytest.mark.parametrize("option", ["create", "drop"])
def test_loss_is_the_mean_over_the_tokens_of_samples_of_any_length(option: Any) -> None:
    model, data = llama(), Tokens([2, 9, 16, 5])
    samples = [data[i] for i in range(4)]
    alone = [
        model(s["input_ids"][None], labels=torch.tensor(s["labels"])[None]).loss.item()
        * (len(s["labels"]) - 1)
        for s in samples
    ]
    padded = PadToBuckets(BUCKETS, pad_token_id=0, batch_size=6, attention_mask=option)(samples)
    padded.pop("id")
    expected = sum(alone) / sum(length - 1 for length in data.lengths)
    assert model(**padded).loss.item() == pytest.approx(expected, rel=1e-12)


def test_hugging_faces_loss_and_gradients_do_not_notice_either() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model, data = transformers.LlamaForCausalLM(config).double(), Tokens([7] * 3)
    samples = [data[i] for i in range(3)]
    plain = {key: torch.stack([torch.as_tensor(s[key]) for s in samples]) for key in ("input_ids", "labels")}
    padded = PadToBuckets(BUCKETS, pad_token_id=0, batch_size=5)(samples)
    loss, gradients = loss_and_gradients(model, padded)
    expected, others = loss_and_gradients(model, plain)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)  # its loss is taken in float32
    torch.testing.assert_close(gradients, others, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("option", "graphs"), [("drop", 3), ("create", 6)])
def test_one_graph_a_bucket_without_a_mask_and_two_with_one(option: Any, graphs: int) -> None:
    data = Tokens([2, 4, 4, 4, 7, 8, 8, 8, 9, 16, 16, 16])
    pad = PadToBuckets(BUCKETS, pad_token_id=0, batch_size=2, attention_mask=option)
    model, built = llama(num_layers=1), []
    model(torch.ones(2, 16, dtype=torch.long))  # makes what is made once

    def count(module: torch.fx.GraphModule, inputs: Any) -> Any:
        built.append(module)
        return module.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=count, dynamic=False)
    sampler = samplers(data.lengths, 2, 1, shuffle=False)[0]
    for batch in DataLoader(data, batch_sampler=sampler, collate_fn=pad):  # type: ignore[arg-type]
        batch.pop("id")
        if option == "create" and batch["attention_mask"].all():
            mark_unpadded(batch["attention_mask"])  # as the strategy does
        compiled(**batch)
    torch.compiler.reset()
    assert len(built) == graphs


# The batch sampler


@settings(deadline=None, max_examples=120)
@given(lengths=lengths_lists, layout=layouts, shuffle=st.booleans(), epoch=st.integers(0, 9))
def test_every_sample_once_and_one_bucket_a_step(
    lengths: list[int], layout: tuple[int, int], shuffle: bool, epoch: int
) -> None:
    batch_size, ranks = layout
    by_rank = samplers(lengths, batch_size, ranks, shuffle=shuffle, seed=5)
    for sampler in by_rank:
        sampler.set_epoch(epoch)
    steps = list(zip(*by_rank, strict=True))  # as many batches on every rank
    assert {len(sampler) for sampler in by_rank} == {len(steps)}
    for batches in steps:
        assert len({bucket(lengths, batch) for batch in batches}) == 1
        sizes = [len(batch) for batch in batches]
        assert 1 <= min(sizes) <= max(sizes) <= min(batch_size, min(sizes) + 1)
    taken = Counter(i for batches in steps for batch in batches for i in batch)
    assert set(taken) == set(range(len(lengths)))
    repeated: Counter[int] = Counter()
    for i, times in taken.items():
        repeated[bucket_length(lengths[i], BUCKETS)] += times - 1
    per_bucket = Counter(bucket_length(length, BUCKETS) for length in lengths)
    for size, number in per_bucket.items():
        remainder = number % (batch_size * ranks)
        assert repeated[size] == (max(0, ranks - remainder) if remainder else 0)


@settings(deadline=None, max_examples=120)
@given(lengths=lengths_lists, layout=layouts, factor=st.integers(1, 3), shuffle=st.booleans())
def test_dropping_leaves_out_less_than_a_group_of_each_bucket(
    lengths: list[int], layout: tuple[int, int], factor: int, shuffle: bool
) -> None:
    batch_size, ranks = layout
    group = batch_size * ranks * factor
    per_bucket = Counter(bucket_length(length, BUCKETS) for length in lengths)
    options = {"drop_last": True, "group_size": group, "shuffle": shuffle}
    if max(per_bucket.values()) < group:
        with pytest.raises(DataError, match=f"one global batch of {group} samples"):
            samplers(lengths, batch_size, ranks, **options)
        return
    steps = list(zip(*samplers(lengths, batch_size, ranks, **options), strict=True))
    taken = [i for batches in steps for batch in batches for i in batch]
    assert all(len(batch) == batch_size for batches in steps for batch in batches)
    assert all(len({bucket(lengths, batch) for batch in batches}) == 1 for batches in steps)
    assert len(taken) == len(set(taken))
    read = Counter(bucket_length(lengths[i], BUCKETS) for i in taken)
    assert read == Counter({size: n - n % group for size, n in per_bucket.items() if n >= group})


@settings(deadline=None, max_examples=30)
@given(lengths=lengths_lists, layout=layouts, drop_mask=st.booleans())
def test_an_epoch_has_no_more_shapes_than_buckets(
    lengths: list[int], layout: tuple[int, int], drop_mask: bool
) -> None:
    batch_size, ranks = layout
    pad = PadToBuckets(
        BUCKETS, pad_token_id=0, batch_size=batch_size, attention_mask="drop" if drop_mask else "create"
    )
    loaders = [
        DataLoader(Tokens(lengths), batch_sampler=sampler, collate_fn=pad)  # type: ignore[arg-type]
        for sampler in samplers(lengths, batch_size, ranks)
    ]
    seen = set()
    for batches in zip(*loaders, strict=True):
        shapes = {tuple((k, v.shape, v.dtype) for k, v in sorted(batch.items())) for batch in batches}
        assert len(shapes) == 1
        seen |= shapes
    assert len(seen) == len({bucket_length(length, BUCKETS) for length in lengths}) <= len(BUCKETS)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    lengths = [1 + 5 * i % 16 for i in range(60)]

    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = samplers(lengths, 4, 1, seed=seed)[0]
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    first, second = ({frozenset(batch) for batch in order(1, epoch)} for epoch in (0, 1))
    assert len(first & second) < 3  # the batches themselves are drawn anew, not only their order
    buckets = [bucket(lengths, batch) for batch in order(1, 0)]
    assert buckets != sorted(buckets)
    assert buckets != sorted(buckets, reverse=True)


def test_order_is_pinned() -> None:
    """Changing the order silently would break every resume: these ids may never change."""
    assert list(samplers([1 + i % 16 for i in range(20)], 2, 1, seed=1234)[0]) == PINNED


def test_without_shuffling_the_longest_bucket_comes_first_in_the_datasets_order() -> None:
    lengths = [3, 9, 5, 4, 16, 6, 10, 1]
    sampler = samplers(lengths, 2, 1, shuffle=False)[0]
    assert list(sampler) == [[1, 4], [2, 5], [0, 3], [6], [7]]  # remainders at the end


def test_lengths_may_be_a_list_an_array_a_tensor_or_a_function() -> None:
    lengths = [1 + 7 * i % 16 for i in range(30)]
    expected = list(samplers(lengths, 4, 1)[0])
    assert list(samplers(np.asarray(lengths, dtype=np.uint16), 4, 1)[0]) == expected
    assert list(samplers(torch.tensor(lengths), 4, 1)[0]) == expected
    assert list(samplers(lambda i: lengths[i], 4, 1, num_samples=30)[0]) == expected


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(0, 16), min_size=48, max_size=150), seed=st.integers(0, 99))
def test_a_group_makes_the_epoch_the_same_for_every_layout(lengths: list[int], seed: int) -> None:
    options = {"drop_last": True, "group_size": 12, "seed": seed}
    epochs = [in_order(samplers(lengths, b, r, **options)) for b, r in ((1, 1), (6, 2), (3, 4), (2, 3))]
    assert all(epoch == epochs[0] for epoch in epochs)


@settings(deadline=None, max_examples=80)
@given(data=st.data(), lengths=lengths_lists, layout=layouts)
def test_resume_at_any_step(data: st.DataObject, lengths: list[int], layout: tuple[int, int]) -> None:
    batch_size, ranks = layout
    first, second = samplers(lengths, batch_size, ranks, seed=3), samplers(lengths, batch_size, ranks, seed=3)
    done = data.draw(st.integers(0, len(first[0])))
    for before, after in zip(first, second, strict=True):
        before.set_epoch(2)
        whole = list(before)
        before.position = done * batch_size * ranks
        after.load_state_dict(pickle.loads(pickle.dumps(before.state_dict())))
        after.set_epoch(2)
        assert list(after) == whole[done:]
        assert len(after) == len(whole)
        after.set_epoch(3)
        assert after.position == 0


def test_resume_under_another_layout_goes_on_with_the_next_sample() -> None:
    lengths = [1 + 5 * i % 16 for i in range(100)]
    options = {"drop_last": True, "group_size": 8, "seed": 3}
    first, second = samplers(lengths, 4, 2, **options), samplers(lengths, 2, 1, **options)
    whole = in_order(first)
    first[0].position = 24
    second[0].load_state_dict(first[0].state_dict())
    assert in_order(second) == whole[24:]


def test_a_loader_goes_on_where_the_strategy_places_it() -> None:
    """What a resumed fit does: the epoch is set, and the batches that were trained on are left out."""
    data = Tokens([1 + 7 * i % 16 for i in range(50)])

    def loader() -> DataLoader[Any]:
        sampler = samplers(data.lengths, 4, 1)[0]
        pad = PadToBuckets(BUCKETS, pad_token_id=0, batch_size=4)
        return DataLoader(data, batch_sampler=sampler, collate_fn=pad)  # type: ignore[arg-type]

    whole = loader()
    data_position.place(whole).sampler.set_epoch(2)  # Lightning's way to it
    ids = [batch["id"].tolist() for batch in whole]
    again = loader()
    placed = data_position.place(again)
    assert placed.position() is None  # no random state is needed
    assert placed.batch_size == 4
    placed.start_at(5, 2, None)
    assert [batch["id"].tolist() for batch in again] == ids[5:]
    assert len(again) == len(ids)


def test_a_loader_with_workers_gives_the_same_batches() -> None:
    data = Tokens([1 + 7 * i % 16 for i in range(20)])
    pad = PadToBuckets(BUCKETS, pad_token_id=0, pad_values={"weights": 1.0}, batch_size=4)
    sampler = samplers(data.lengths, 4, 1)[0]
    alone = DataLoader(data, batch_sampler=sampler, collate_fn=pad)  # type: ignore[arg-type]
    workers: DataLoader[Any] = DataLoader(
        data,  # type: ignore[arg-type]
        batch_sampler=copy.deepcopy(sampler),
        collate_fn=pickle.loads(pickle.dumps(pad)),
        num_workers=2,
        multiprocessing_context="spawn",  # everything is pickled
    )
    torch.testing.assert_close(list(workers), list(alone), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"num_replicas": 2, "rank": 2}, "rank 2 of 2 replicas"),
        ({"group_size": 3, "drop_last": True}, "group_size 3 must be a multiple of the 2 samples of a step"),
        ({"group_size": 4}, "needs drop_last=True"),
        ({"lengths": [1, -1]}, "minimum of -1"),
        ({"lengths": [1.5, 2.0]}, "float64"),
        ({"lengths": [[1, 2]]}, r"shape \(1, 2\)"),
        ({"lengths": len}, "num_samples must be given"),
        ({"num_samples": 4}, "num_samples must be given"),
        ({"buckets": [8, 4]}, "rising order"),
    ],
)
def test_bad_arguments(options: dict[str, Any], words: str) -> None:
    options = {"batch_size": 2, "num_replicas": 1, "rank": 0, "buckets": BUCKETS, **options}
    with pytest.raises(ConfigError, match=words):
        BucketBatchSampler(options.pop("lengths", [1, 2, 3, 4]), **options)


def test_no_samples_and_buckets_that_are_never_read() -> None:
    with pytest.raises(DataError, match="no samples"):
        samplers([], 1, 1)
    with pytest.warns(
        UserWarning, match=r"global batch of 2 are never read; samples by bucket: \{8: 1, 4: 3\}"
    ):
        BucketBatchSampler(
            [1, 2, 3, 5], buckets=BUCKETS, batch_size=2, num_replicas=1, rank=0, drop_last=True
        )


def test_bad_position_and_foreign_state() -> None:
    sampler = samplers([1] * 10, 2, 2, seed=1)[0]
    for position in (-4, 3, 16):
        with pytest.raises(ConfigError, match=f"position {position}"):
            sampler.position = position
    state = sampler.state_dict()
    for name, other in (("seed", 2), ("num_samples", 11), ("group_size", 8), ("buckets", [4, 8])):
        with pytest.raises(ConfigError, match=f"saved order has {name} "):
            sampler.load_state_dict({**state, name: other})
    with pytest.raises(ConfigError, match="saved order has bucket_of_each_sample"):
        samplers([1] * 9 + [5], 2, 2, seed=1)[0].load_state_dict(state)
