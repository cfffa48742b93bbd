"""Weights from any checkpoint into a module: whole modules from their hyper-parameters, and parts of one.

Works at any layout, inside a Trainer or outside: every rank reads its own slices. Without ranks nothing special is
needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from neuron_lightning.checkpoint.formats import convert, lightning_file, loading, names
from neuron_lightning.checkpoint.formats.contents import Contents
from neuron_lightning.checkpoint.formats.loading import LoadReport
from neuron_lightning.checkpoint.typed_json import Named
from neuron_lightning.errors import CheckpointError
from neuron_lightning.lightning.checkpoint_io import show_transfer
from neuron_lightning.models.llama_hf import from_hf_name
from neuron_lightning.models.llama_nxd import NXD_LLAMA

Module = TypeVar("Module", bound=nn.Module)


def load_from_checkpoint(
    cls: type[Module],
    path: str | Path,
    *,
    strict: bool = True,
    rename: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> Module:
    """Builds a module from a checkpoint's hyper-parameters and fills it with its weights. All ranks together.

    Args:
        cls: the module's class. What it takes besides the saved hyper-parameters is given in ``kwargs``.
        path: a folder of ours, a Lightning ``.ckpt`` file, or any other format with hyper-parameters in ``kwargs``.
        strict: whether a missing or unexpected name is an error; otherwise what was not loaded is logged.
        rename: regular expressions and their replacements, applied to the checkpoint's names.
        **kwargs: arguments of ``cls``, ahead of the saved hyper-parameters. Classes and functions are saved by name
            only and are not imported: give them here.

    Returns:
        The module, built for the current mesh. A LightningModule's ``configure_model`` has run.

    Raises:
        CheckpointError: not a checkpoint, damaged, of another model, or an argument of ``cls`` is missing.
    """
    contents = describe(Path(path))
    module = cls(**_arguments(cls, contents.trainer, kwargs, path))
    if isinstance(module, LightningModule):
        module.on_load_checkpoint(contents.trainer)
        module.configure_model()
    report = _load(module, Path(path), contents, strict=strict, rename=rename)
    if not strict and (report.missing or report.unexpected):
        rank_zero_info(f"{path}: {report}")
    return module


def load_weights(
    module: nn.Module, path: str | Path, *, strict: bool = True, rename: Mapping[str, str] | None = None
) -> LoadReport:
    """Fills a module with a checkpoint's weights, or a part of it. All ranks together.

    Names of a Hugging Face folder become those of our Llama where the module has them.

    Args:
        module: for the current mesh.
        path: a checkpoint of any format: ours, Hugging Face, safetensors, DCP, NxD, Lightning.
        strict: whether a missing or unexpected name is an error; another shape always is.
        rename: regular expressions and their replacements, applied to the checkpoint's names, in order:
            ``{r"^backbone\\.": "model."}``.

    Returns:
        The names that were loaded, that the checkpoint lacks, and that the module lacks.

    Raises:
        CheckpointError: damaged, or of another model; nothing is changed.
    """
    return _load(module, Path(path), describe(Path(path)), strict=strict, rename=rename)


def describe(path: Path) -> Contents:
    """What is at ``path``, whatever its format; optimizer state left out. Raises :class:`CheckpointError`."""
    kind = convert.detect(path)
    if kind == "lightning":
        document = {**lightning_file.load(path), "optimizer_states": []}
        return lightning_file.describe(document, lambda name, entry, weights: [(name, 0)], lambda *_: [])
    options = convert.ConvertOptions(source=kind, target="neuron", rules=NXD_LLAMA, weights_only=True)
    return convert.read(path, options).weights_only()


def _load(
    module: nn.Module, path: Path, contents: Contents, *, strict: bool, rename: Mapping[str, str] | None
) -> LoadReport:
    targets, parameters = module.state_dict(), dict(module.named_parameters())
    contents = contents.renamed(_as_ours(contents, loading.canonical_names(targets, parameters)))
    if rename is not None:
        contents = contents.renamed(names.from_rules(rename))
    with show_transfer("Loading", path) as progress:
        report = loading.load_module(path, contents, targets, parameters, strict=strict, progress=progress)
    return report


def _as_ours(contents: Contents, wanted: Iterable[str]) -> names.Rename:
    """Hugging Face's names as those of our Llama, if the module has these and the checkpoint has not."""
    here = [name for name in wanted if ".qkv_proj.weight_q" in name or ".gate_up_proj.weight_0" in name]
    if not here or any(".qkv_proj." in name for name in contents.tensors):
        return names.identity
    prefix = here[0].partition("model.layers.")[0]
    return names.chained(from_hf_name, names.add_prefix(prefix))


def _arguments(
    cls: type[nn.Module], trainer: Mapping[str, Any], given: Mapping[str, Any], path: str | Path
) -> dict[str, Any]:
    """The saved hyper-parameters that ``cls`` takes, and what is given instead."""
    parameters = inspect.signature(cls.__init__).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    saved: Mapping[str, Any] = trainer.get("hyper_parameters") or {}
    found = {key: value for key, value in saved.items() if takes_all or key in parameters}
    found.update(given)
    if by_name := [key for key, value in found.items() if isinstance(value, Named)]:
        kept = found[by_name[0]].qualified_name
        raise CheckpointError(
            f"{path} has kept only the name {kept} of the argument {by_name[0]!r} of {cls.__name__}: classes and "
            f"functions are not imported from a checkpoint; pass {by_name[0]}=… ({len(by_name)} such: "
            f"{', '.join(by_name)})."
        )
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [
        k for k, p in parameters.items() if p.default is p.empty and k != "self" and p.kind not in kinds
    ]
    if missing := [key for key in needed if key not in found]:
        raise CheckpointError(
            f"{cls.__name__} needs {', '.join(missing)}, which {path} does not hold: pass {missing[0]}=…, or call "
            "save_hyperparameters() in __init__ before training."
        )
    return found
