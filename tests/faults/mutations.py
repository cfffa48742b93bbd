"""Random changes to the files of a checkpoint, sealed again with fitting hashes as an attacker would."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from pathlib import Path
from typing import Any

from neuron_lightning.checkpoint import manifest

Node = MutableMapping[str, Any] | MutableSequence[Any]


def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    7,
    1 << 31,
    1 << 40,
    (1 << 50) - 1,
    (1 << 63) - 1,
    1 << 63,
    1 << 200,
    -(1 << 63),
    0.5,
    1e308,
    True,
)
STRINGS = (
    "", ".", "..", "../outside/secret", "/etc/passwd", "a/b", "a\\b", "\x00", "\ud800", "manifest.json", "os.system",
    "trainer.json", "sharded", "deduped", "float64", "uint8", "sha512", "model", "model/embed.weight", "x" * 100_000,
    "rank-00001.model.safetensors", "\N{CYRILLIC SMALL LETTER A}.json", "step", "-inf", "O", "cpu:99", "V9999999",
)  # fmt: skip
TYPES = (
    "tuple", "set", "frozenset", "Size", "dict", "OrderedDict", "Counter", "tensor", "enum", "numpy", "ndarray", "float",
    "Path", "timedelta", "datetime", "date", "bytes", "dtype", "device", "name", "object", "pickle", "reduce",
)  # fmt: skip
VALUES: tuple[Callable[[random.Random], Any], ...] = (
    lambda r: r.choice(NUMBERS),
    lambda r: r.choice(STRINGS),
    lambda r: r.choice((None, [], {}, [[]], [None], False)),
    lambda r: [r.choice(NUMBERS) for _ in range(r.randrange(20))],
    lambda r: {"$type": r.choice(TYPES), "value": r.choice(NUMBERS + STRINGS + ([1, 2], [[1, 2]], {}))},
    lambda r: {"$type": "ndarray", "value": "AAAA", "dtype": r.choice(("<f4", "O", "<i8", "V3")), "shape": [r.choice(NUMBERS)]},
    lambda r: _nested(r.choice((5, 90, 400))),
)  # fmt: skip


def _nodes(value: Any) -> Iterator[Node]:
    if isinstance(value, (dict, list)) and value:
        yield value
        for child in value.values() if isinstance(value, dict) else value:
            yield from _nodes(child)


def mutate(document: Any, random_: random.Random) -> Any:
    """A changed copy of parsed JSON: one to three values replaced, removed, repeated, exchanged or renamed."""
    changed = json.loads(json.dumps(document))
    for _ in range(random_.choice((1, 1, 1, 2, 3))):
        nodes = list(_nodes(changed))
        if nodes:
            _change(random_.choice(nodes), random_, nodes)
    return changed


def _change(node: Node, random_: random.Random, nodes: list[Node]) -> None:
    place: Any = random_.choice(list(node)) if isinstance(node, dict) else random_.randrange(len(node))
    kind = random_.randrange(7)
    if kind <= 2:
        node[place] = random_.choice(VALUES)(random_)
    elif kind == 3:
        del node[place]
    elif kind == 4 and isinstance(node, list):
        node[place:place] = [copy.deepcopy(node[place])] * random_.choice((1, 1, 2, 100))
    elif kind == 4 and isinstance(node, dict):
        node[random_.choice(STRINGS)] = copy.deepcopy(node[place])
    elif kind == 5 and isinstance(node, dict):
        node[random_.choice(STRINGS)] = node.pop(place)
    elif type(node[place]) is int:
        node[place] += random_.choice((-1, 1, -2, 8))
    else:
        other = random_.choice(nodes)
        node[place] = copy.deepcopy(other[random_.choice(list(other)) if isinstance(other, dict) else 0])


def flip(raw: bytes, random_: random.Random) -> bytes:
    """A changed copy of bytes: flipped, removed, repeated, inserted."""
    data = bytearray(raw)
    for _ in range(random_.choice((1, 1, 2, 8))):
        start = random_.randrange(len(data) + 1)
        kind = random_.randrange(5)
        if kind <= 1 and start < len(data):
            data[start] ^= 1 << random_.randrange(8)
        elif kind == 2:
            del data[start : start + random_.choice((1, 4, 100))]
        elif kind == 3:
            data[start:start] = data[start : start + random_.choice((1, 8, 64))]
        else:
            data[start:start] = random_.randbytes(random_.choice((1, 3, 16)))
    return bytes(data)


def unsealed(folder: Path) -> dict[str, Any]:
    """The manifest's JSON without its digest."""
    document: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    document.pop("digest", None)
    return document


def seal(document: Any) -> bytes:
    """The bytes of a manifest with this body; of what no manifest can be, plain JSON."""
    if isinstance(document, dict):
        try:
            return manifest._seal(document)
        except ValueError:
            pass  # NaN and infinities have no canonical form
    return json.dumps(document).encode()


def replace_file(folder: Path, name: str, data: bytes) -> None:
    """Gives a file other contents, and the manifest a size and a hash that fit."""
    (folder / name).write_bytes(data)
    if name != "manifest.json":
        document = unsealed(folder)
        document["files"][name].update(size=len(data), hash=hashlib.sha256(data).hexdigest())
        (folder / "manifest.json").write_bytes(seal(document))


def mutate_tensors(raw: bytes, random_: random.Random) -> bytes:
    """A changed safetensors file: its header as JSON, its length field, or any bytes."""
    (size,) = struct.unpack("<Q", raw[:8])
    kind = random_.randrange(4)
    if kind == 0:
        return flip(raw, random_)
    if kind == 1:
        return struct.pack("<Q", random_.choice((0, 1, size - 1, size + 8, 1 << 31, (1 << 64) - 1))) + raw[8:]
    header = json.dumps(mutate(json.loads(raw[8 : 8 + size]), random_)).encode()
    return struct.pack("<Q", len(header)) + header + raw[8 + size :]
