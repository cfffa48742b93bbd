"""Values survive JSON with their types; nothing is executed, and what does not fit is named."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter, OrderedDict
from datetime import datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuron_lightning.checkpoint import typed_json
from neuron_lightning.checkpoint.typed_json import Named
from neuron_lightning.errors import CheckpointError


def round_trip(value: Any) -> Any:
    data, tensors = typed_json.encode(value, where="state")
    return typed_json.decode(json.loads(json.dumps(data, allow_nan=False)), tensors)


class Color(Enum):
    RED = "red"


VALUES = [
    None,
    True,
    -(1 << 200),
    0.1,
    math.inf,
    -math.inf,
    "tëxt\x00",
    [1, [2, "x"]],
    (1, (2.5, None), []),
    {1, "a", (2, 3)},
    frozenset({4}),
    {"a": {"b": 1}},
    {1: "int", "1": "str", (1, 2): "tuple", None: 0, 2.5: 1},
    {"$type": "a user's own key"},
    OrderedDict([("b", 1), ("a", 2)]),
    Counter({3: 2, 7: 1}),
    Path("/data/run 1"),
    timedelta(days=1, seconds=2, microseconds=3),
    datetime(2026, 10, 1, 12, 30),
    b"\x00\xff",
    torch.bfloat16,
    torch.device("cpu"),
    torch.Size([2, 3]),
    np.float32(0.1),
    np.int64(-5),
    np.bool_(True),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_value_and_type_survive(value: Any) -> None:
    back = round_trip(value)
    assert back == value
    assert type(back) is type(value)


def test_nan_and_negative_zero() -> None:
    assert math.isnan(round_trip(math.nan))
    assert math.copysign(1, round_trip(-0.0)) == -1


@pytest.mark.parametrize("dtype", ["<f8", ">i4", "bool", "uint16", "int8", "float16"])
def test_numpy_arrays(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    back = round_trip({"a": array})["a"]
    assert np.array_equal(back, array)
    assert back.shape == (2, 3)
    back[0, 0] = 1


def test_tensors_go_beside_the_json() -> None:
    value = {"best": torch.tensor(0.5), "list": [torch.arange(3), torch.ones(2, dtype=torch.bfloat16)]}
    data, tensors = typed_json.encode(value, tensor_prefix="trainer")
    assert sorted(tensors) == ["trainer/0", "trainer/1", "trainer/2"]
    assert "tensor" in json.dumps(data)
    back = typed_json.decode(data, tensors)
    assert back["best"].item() == 0.5
    assert torch.equal(back["list"][0], torch.arange(3))


def test_enums_come_back_as_their_value_and_classes_as_names() -> None:
    assert round_trip({"c": Color.RED}) == {"c": "red"}
    assert round_trip(torch.optim.AdamW) == Named("torch.optim.adamw.AdamW")
    assert round_trip(math.sqrt) == Named("math.sqrt")


def test_names_are_never_imported() -> None:
    back = typed_json.decode({"$type": "name", "value": "module_that_does_not_exist.evil"})
    assert back == Named("module_that_does_not_exist.evil")


@dataclasses.dataclass
class Thing:
    x: int = 1


@pytest.mark.parametrize(
    "value", [Thing(), object(), 1j, np.array(["a"]), iter([]), torch.ones(2).to_sparse()]
)
def test_anything_else_is_an_error_that_names_its_place(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"trainer\.callbacks\['My Callback'\]\[1\]"):
        typed_json.encode({"callbacks": {"My Callback": [0, value]}}, where="trainer")


def test_a_value_that_contains_itself_is_an_error() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="nested deeper than 100"):
        typed_json.encode(loop, where="state")


def test_large_arrays_are_refused() -> None:
    with pytest.raises(CheckpointError, match="at most 1048576 bytes"):
        typed_json.encode({"a": np.zeros(1 << 18)}, where="state")


@pytest.mark.parametrize(
    "data",
    [
        {"$type": "exec", "value": "1"},
        {"$type": "dtype", "value": "load"},
        {"$type": "dtype", "value": "onnx"},
        {"$type": "dtype", "value": ["float32"]},
        {"$type": "float", "value": "1e5"},
        {"$type": "ndarray", "value": "AAAA", "dtype": "3f", "shape": [1]},
        {"$type": "ndarray", "value": "AAAA", "dtype": "f4,i4", "shape": [1]},
        {"$type": "ndarray", "value": "AAAA", "dtype": "O", "shape": [1]},
        {"$type": "ndarray", "value": "AAAA", "dtype": "<f4", "shape": [99]},
        {"$type": "tuple"},
        {"$type": "dict", "value": [[[], 1]]},
        {"$type": "tensor", "value": "nowhere"},
        {"$type": ["tuple"], "value": []},
        {"$type": "device", "value": "nonsense"},
    ],
)
def test_poisoned_json_is_our_error(data: Any) -> None:
    with pytest.raises(CheckpointError):
        typed_json.decode(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(json_values)
def test_any_nesting_survives(value: Any) -> None:
    assert round_trip(value) == value
