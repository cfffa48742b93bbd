"""Python values as JSON that remembers their types, without pickle.

Plain JSON covers None, bool, int, finite float, str, list and dict with string keys; they are written as they
are. Everything else is an object with the key ``"$type"``. Tensors are not written here: they are set aside under
a key, for a safetensors file. Classes and functions are written by name and come back as :class:`Named`; nothing
is ever imported or called on load. Whatever is not listed in :func:`encode` is an error that names its place.
"""

from __future__ import annotations

import base64
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from enum import Enum
from pathlib import Path, PurePath
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuron_lightning.errors import CheckpointError

TYPE = "$type"
MAX_DEPTH = 100
MAX_ARRAY_BYTES = 1 << 20
_ARRAY_KINDS = "biuf"
_NUMPY_DTYPE = re.compile(rf"[<|][{_ARRAY_KINDS}]\d{{1,2}}", re.ASCII)
_DTYPES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)}
_DECODE_ERRORS = (
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    RuntimeError,
    SyntaxError,
)


@dataclass(frozen=True)
class Named:
    """A class or function of which only the name was stored.

    Attributes:
        qualified_name: e.g. ``torch.optim.adamw.AdamW``.
    """

    qualified_name: str


def encode(value: Any, *, where: str = "", tensor_prefix: str = "tensor") -> tuple[Any, dict[str, Tensor]]:
    """Turns ``value`` into what ``json.dumps(allow_nan=False)`` takes, and the tensors that it refers to.

    Accepted: None, bool, int, float (nan and infinities too), str, bytes, list, tuple, set, frozenset, dict
    (any of these as keys), OrderedDict, Counter, Path, timedelta, datetime, date, torch.dtype, torch.device,
    torch.Size, dense tensors, numpy scalars and arrays up to 1 MiB, enum members (stored as their value), classes
    and functions (by name). Other subclasses of dict come back as dict.

    Args:
        value: what to store.
        where: name of ``value`` in error messages.
        tensor_prefix: the tensors' keys are ``<prefix>/0``, ``<prefix>/1`` and so on.

    Raises:
        CheckpointError: a value of another type; the message holds its key path.
    """
    encoder = _Encoder(tensor_prefix)
    return encoder.encode(value, where, 0), encoder.tensors


def decode(data: Any, tensors: Mapping[str, Tensor] | Callable[[str], Tensor] | None = None) -> Any:
    """The value that :func:`encode` was given.

    Args:
        data: parsed JSON.
        tensors: the tensors set aside, by key, or a function that reads one.

    Raises:
        CheckpointError: not something that :func:`encode` wrote.
    """
    lookup = tensors if callable(tensors) else (tensors or {}).__getitem__
    try:
        return _decode(data, lookup)
    except CheckpointError:
        raise
    except _DECODE_ERRORS as error:
        raise CheckpointError(
            f"the stored state is not what this package writes ({type(error).__name__}: {error}): the checkpoint "
            "is damaged or was edited."
        ) from error


class _Encoder:
    """One pass over a value; collects the tensors that it meets."""

    def __init__(self, tensor_prefix: str) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._prefix = tensor_prefix

    def encode(self, value: Any, where: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise CheckpointError(
                f"{where[:200]} is nested deeper than {MAX_DEPTH} levels (or contains itself): store something flatter."
            )
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else _typed("float", repr(value))
        if isinstance(value, Enum):
            return _typed(
                "enum", self.encode(value.value, where, depth + 1), enum=_qualified_name(type(value))
            )
        if isinstance(value, dict):
            return self._dict(value, where, depth)
        if type(value) in _SEQUENCES:
            return self._sequence(value, where, depth)
        if isinstance(value, Tensor):
            return self._tensor(value, where)
        return _leaf(value, where)

    def _sequence(self, value: Any, where: str, depth: int) -> Any:
        items = [self.encode(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        name = _SEQUENCES[type(value)]
        if name in ("set", "frozenset"):
            items.sort(key=repr)
        return items if name == "list" else _typed(name, items)

    def _dict(self, value: dict[Any, Any], where: str, depth: int) -> Any:
        name = {OrderedDict: "OrderedDict", Counter: "Counter"}.get(type(value), "dict")
        plain = name == "dict" and all(type(key) is str for key in value) and TYPE not in value
        pairs = [(key, self.encode(item, _join(where, key), depth + 1)) for key, item in value.items()]
        if plain:
            return dict(pairs)
        keyed = [[self.encode(key, f"the key {key!r} of {where}", depth + 1), item] for key, item in pairs]
        return _typed(name, keyed)

    def _tensor(self, value: Tensor, where: str) -> Any:
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise _unsupported(value, where, "only dense tensors with data are stored")
        key = f"{self._prefix}/{len(self.tensors)}"
        self.tensors[key] = value.detach()
        return _typed("tensor", key)


def _leaf(value: Any, where: str) -> Any:
    """A value without parts that is not plain JSON."""
    if isinstance(value, np.generic | np.ndarray):
        return _numpy(value, where)
    if isinstance(value, PurePath):
        return _typed("Path", str(value))
    if type(value) is timedelta:
        return _typed("timedelta", [value.days, value.seconds, value.microseconds])
    if type(value) in (datetime, date):
        return _typed(type(value).__name__, value.isoformat())
    if isinstance(value, bytes | bytearray):
        return _typed("bytes", base64.b64encode(value).decode("ascii"))
    if isinstance(value, torch.dtype):
        return _typed("dtype", str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return _typed("device", str(value))
    if isinstance(value, type | FunctionType | BuiltinFunctionType | MethodType):
        return _typed("name", _qualified_name(value))
    if isinstance(value, str):
        return str.__str__(value)
    raise _unsupported(value, where, "it is none of the types that a checkpoint stores without pickle")


def _numpy(value: Any, where: str) -> Any:
    if value.dtype.kind not in _ARRAY_KINDS or value.nbytes > MAX_ARRAY_BYTES:
        raise _unsupported(
            value,
            where,
            f"numpy arrays hold numbers and at most {MAX_ARRAY_BYTES} bytes, this one {value.nbytes}",
        )
    raw = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode("ascii")
    little = value.dtype.newbyteorder("<") if value.dtype.byteorder == ">" else value.dtype
    if value.dtype.byteorder == ">":
        raw = base64.b64encode(np.ascontiguousarray(value.astype(little)).tobytes()).decode("ascii")
    kind = "ndarray" if isinstance(value, np.ndarray) else "numpy"
    return _typed(kind, raw, dtype=little.str, shape=list(value.shape))


def _unsupported(value: Any, where: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"cannot store {where or 'the state'}: a {_qualified_name(type(value))}; {why}. Return numbers, strings, "
        "tensors, lists, tuples, sets or dicts of them instead (state_dict() of the object, or "
        "save_hyperparameters(ignore=[...]) for a hyper-parameter)."
    )


def _typed(name: str, value: Any, **extra: Any) -> dict[str, Any]:
    return {TYPE: name, "value": value, **extra}


def _join(where: str, key: Any) -> str:
    if type(key) is str and key.isidentifier():
        return f"{where}.{key}" if where else key
    return f"{where}[{key!r}]"


def _qualified_name(value: Any) -> str:
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", "?")
    return f"{module}.{name}" if module and module != "builtins" else str(name)


_SEQUENCES: dict[type, str] = {
    list: "list",
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    torch.Size: "Size",
}


def _decode(data: Any, lookup: Callable[[str], Tensor]) -> Any:
    if isinstance(data, list):
        return [_decode(item, lookup) for item in data]
    if not isinstance(data, dict):
        return data
    if TYPE not in data:
        return {key: _decode(item, lookup) for key, item in data.items()}
    name, value = data[TYPE], data["value"]
    if name in _CONTAINERS:
        return _CONTAINERS[name](_decode(value, lookup))
    if name in ("dict", "OrderedDict"):
        pairs = [(_decode(key, lookup), _decode(item, lookup)) for key, item in value]
        return dict(pairs) if name == "dict" else OrderedDict(pairs)
    if name == "Counter":
        return Counter({_decode(key, lookup): _decode(item, lookup) for key, item in value})
    if name == "tensor":
        return lookup(value)
    if name == "enum":
        return _decode(value, lookup)
    if name in ("numpy", "ndarray"):
        return _decode_numpy(data)
    if name in _LEAVES:
        return _LEAVES[name](value)
    raise ValueError(f"unknown type {name!r}")


def _decode_numpy(data: Mapping[str, Any]) -> Any:
    if not _NUMPY_DTYPE.fullmatch(str(data["dtype"])):  # others make numpy parse and even compile them
        raise ValueError(f"numpy dtype {str(data['dtype'])[:100]!r} is not that of a number")
    dtype = np.dtype(str(data["dtype"]))
    array = np.frombuffer(base64.b64decode(data["value"], validate=True), dtype=dtype).copy()
    array = array.reshape([int(n) for n in data["shape"]])
    return array if data[TYPE] == "ndarray" else array[()]


def _decode_dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:  # getattr(torch, name) could import anything
        raise ValueError(f"{str(name)[:100]!r} is not a dtype")
    return _DTYPES[name]


def _decode_float(text: str) -> float:
    if text not in ("nan", "inf", "-inf"):
        raise ValueError(f"{text!r} is not a special float")
    return float(text)


_CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "Size": torch.Size,
}
_LEAVES: dict[str, Callable[[Any], Any]] = {
    "float": _decode_float,
    "Path": Path,
    "timedelta": lambda parts: timedelta(*parts),
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
    "bytes": lambda text: base64.b64decode(text, validate=True),
    "dtype": _decode_dtype,
    "device": torch.device,
    "name": Named,
}
