"""The documented schema of the manifest is the one that is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_lightning.checkpoint import manifest, output, tensor_file
from tests.unit.test_checkpoint_folder import Model, save, trained

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "manifest.schema.json").read_text(encoding="utf-8"))
KNOWN = {
    *(
        "$schema",
        "title",
        "description",
        "$defs",
        "$ref",
        "type",
        "required",
        "additionalProperties",
        "properties",
    ),
    *("const", "enum", "minimum", "pattern", "propertyNames", "items", "maxItems"),
}
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "null": type(None)}


def problems(value: Any, schema: dict[str, Any], where: str = "manifest") -> list[str]:
    """What is wrong with ``value``; knows the keywords that our schema uses, and no others."""
    assert set(schema) <= KNOWN, set(schema) - KNOWN
    if "$ref" in schema:
        return problems(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], where)
    found = []
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(isinstance(value, TYPES[t]) and not isinstance(value, bool) for t in types):
        return [f"{where} is a {type(value).__name__}"]
    if "const" in schema and value != schema["const"]:
        found.append(f"{where} is {value!r}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where} is {value!r}")
    if "minimum" in schema and value < schema["minimum"]:
        found.append(f"{where} is {value}")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{where} is {value!r}")
    if isinstance(value, dict):
        found += [f"{where} lacks {key}" for key in schema.get("required", []) if key not in value]
        other = schema.get("additionalProperties", True)
        for key, item in value.items():
            found += problems(key, schema.get("propertyNames", {}), f"the name {key!r}")
            inner = schema.get("properties", {}).get(key, other)
            if inner is False:
                found.append(f"{where} has {key}")
            elif isinstance(inner, dict):
                found += problems(item, inner, f"{where}.{key}")
    if isinstance(value, list):
        if len(value) > schema.get("maxItems", len(value)):
            found.append(f"{where} has {len(value)} items")
        for index, item in enumerate(value):
            found += problems(item, schema.get("items", {}), f"{where}[{index}]")
    return found


@pytest.mark.parametrize("kind", ["deduped", "sharded"])
def test_written_manifests_follow_the_schema(tmp_path: Path, kind: str) -> None:
    model, optimizer = trained(0, lambda p: torch.optim.AdamW(p, lr=0.1), 2)
    save(tmp_path / "a", model, [optimizer], rank_state={"t": torch.ones(2)}, state_dict_type=kind)
    save(tmp_path / "b", Model(), trainer_state={"data_position": {"epoch": 1, "ids": (1, 2)}})
    for name in ("a", "b"):
        assert problems(json.loads((tmp_path / name / "manifest.json").read_bytes()), SCHEMA) == []


def test_the_schema_refuses_what_it_should(tmp_path: Path) -> None:
    save(tmp_path / "a", Model())
    document = json.loads((tmp_path / "a" / "manifest.json").read_bytes())
    for change in (
        {"version": 2},
        {"step": "3"},
        {"files": {"../x": {"kind": "model", "size": 1, "algorithm": "sha256", "hash": "00"}}},
        {"tensors": {"model/x": {"dtype": "float32", "shape": [-1], "boxes": []}}},
        {"more": 1},
    ):
        assert len(problems({**document, **change}, SCHEMA)) == 1, change


def test_the_schema_names_what_the_code_knows() -> None:
    properties = SCHEMA["properties"]
    record = properties["files"]["additionalProperties"]["properties"]
    assert record["kind"]["enum"] == list(manifest.KINDS)
    assert record["algorithm"]["enum"] == list(tensor_file.ALGORITHMS)
    assert properties["digest"]["properties"]["algorithm"]["const"] == output.ALGORITHM
    dtypes = properties["tensors"]["additionalProperties"]["properties"]["dtype"]["enum"]
    assert dtypes == list(tensor_file.DTYPE_NAMES)
    assert (properties["format"]["const"], properties["version"]["const"]) == (
        manifest.FORMAT,
        manifest.VERSION,
    )
