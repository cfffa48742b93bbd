"""Renaming of tensors on the way from one format to another."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from neuron_lightning.errors import CheckpointError

Rename = Callable[[str], str]


def identity(name: str) -> str:
    """The name itself."""
    return name


def chained(*renames: Rename) -> Rename:
    """One after the other."""

    def rename(name: str) -> str:
        for each in renames:
            name = each(name)
        return name

    return rename


def strip_prefix(prefix: str) -> Rename:
    """Takes a prefix off the names that have it."""
    return lambda name: name.removeprefix(prefix)


def add_prefix(prefix: str) -> Rename:
    """Puts a prefix before every name."""
    return lambda name: prefix + name


def from_rules(rules: Mapping[str, str]) -> Rename:
    """Applies regular expressions to a name, in order, each to what the one before left.

    Args:
        rules: pattern to replacement, as ``re.sub`` takes them: ``{r"^backbone\\.": "model."}``.

    Raises:
        CheckpointError: a pattern that does not compile, or a replacement that does not fit it.
    """
    try:
        compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules.items()]
    except re.error as error:
        raise CheckpointError(
            f"the rename rule {error.pattern!r} is no regular expression: {error}."
        ) from error

    def rename(name: str) -> str:
        for pattern, replacement in compiled:
            try:
                name = pattern.sub(replacement, name)
            except (re.error, IndexError) as error:
                raise CheckpointError(
                    f"the rename rule {pattern.pattern!r}: {replacement!r} does not apply to {name}: {error}."
                ) from error
        return name

    return rename


def read_rules(path: Path) -> Rename:
    """Rules from a JSON object in a file. Raises :class:`CheckpointError`."""
    try:
        rules = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(rules, dict) or not all(isinstance(v, str) for v in rules.values()):
        raise CheckpointError(
            f"{path} must hold one JSON object of regular expressions and their replacements, such as "
            '{"^backbone\\\\.": "model."}.'
        )
    return from_rules(rules)
