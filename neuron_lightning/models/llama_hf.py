"""Llamas in Hugging Face folders: which of our tensors is which of theirs, saving and loading.

Our layers fuse query, key and value, and gate and up. In a folder they are apart, under the names that
``transformers`` uses, whatever the layout: weights go in and out at any tensor-parallel size.
"""

from __future__ import annotations

import os
import re

import torch

from neuron_lightning.models.hf_folder import write_folder
from neuron_lightning.models.hf_reader import read_config, read_folder
from neuron_lightning.models.llama import LlamaConfig, LlamaForCausalLM
from neuron_lightning.parallel.initialize import deferred_init

_QKV = re.compile(r"\.qkv_proj\.(weight|bias)_([qkv012])$")
_GATE_UP = re.compile(r"\.gate_up_proj\.(weight|bias)_([01])$")
_THEIR_QKV = re.compile(r"\.([qkv])_proj\.(weight|bias)$")
_THEIR_GATE_UP = re.compile(r"\.(gate|up)_proj\.(weight|bias)$")
_GATE, _UP = "gate", "up"
_LETTERS = {"0": "q", "1": "k", "2": "v"}
"""The parts of a query-key-value layer that is a column-parallel layer of stride 3."""


def to_hf_name(canonical: str) -> str:
    """Our canonical (unfused, global) name of a tensor to Hugging Face's.

    >>> to_hf_name("model.layers.0.self_attn.qkv_proj.weight_k")
    'model.layers.0.self_attn.k_proj.weight'
    """
    name = _QKV.sub(lambda m: f".{_LETTERS.get(m[2], m[2])}_proj.{m[1]}", canonical)
    return _GATE_UP.sub(lambda m: f".{(_GATE, _UP)[int(m[2])]}_proj.{m[1]}", name)


def from_hf_name(name: str) -> str:
    """Hugging Face's name of a tensor to our canonical one.

    >>> from_hf_name("model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.gate_up_proj.weight_1'
    """
    canonical = _THEIR_QKV.sub(r".qkv_proj.\2_\1", name)
    return _THEIR_GATE_UP.sub(lambda m: f".gate_up_proj.{m[2]}_{(_GATE, _UP).index(m[1])}", canonical)


def save_hf(
    model: LlamaForCausalLM,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes a folder that ``transformers`` loads without this package. Every rank calls it together.

    Tensor by tensor is gathered over the first tensor-parallel group; rank 0 writes. Vocabulary padding
    stays out.

    Args:
        model: the model, any layout.
        folder: must not exist, or be empty, unless ``overwrite``.
        dtype: of the written weights; None: the model's.
        max_shard_bytes: size at which another file is begun.
        overwrite: replaces an existing folder.

    Raises:
        CheckpointError: on every rank, if the folder cannot be written.
    """
    write_folder(
        model,
        folder,
        name_map=to_hf_name,
        config=model.config.to_hf(),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )


def load_hf(
    model: LlamaForCausalLM, folder: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> None:
    """Fills ``model``, at any layout, from a Hugging Face folder; each rank reads its own slices.

    Args:
        model: parameters may be on ``meta`` or undrawn.
        folder: ``model.safetensors``, or several files with their index.
        device: where parameters that are on ``meta`` go.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape (all are listed), or a file is
            damaged.
    """
    ignore = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(len(model.model.layers))}
    if model.config.tie_word_embeddings:
        ignore.add("lm_head.weight")
    read_folder(model, folder, name_map=to_hf_name, ignore=ignore, device=device)


def from_hf(
    folder: str | os.PathLike[str], *, device: torch.device | str = "cpu", **overrides: object
) -> LlamaForCausalLM:
    """Builds the model that a Hugging Face folder describes, with its weights, for the current mesh.

    Args:
        folder: with ``config.json``.
        device: where the parameters go.
        **overrides: fields of :class:`LlamaConfig` to change, e.g. ``pad_vocab=True``.

    Raises:
        CheckpointError, ConfigError: as :func:`load_hf` and :class:`LlamaConfig`.
    """
    config = LlamaConfig.from_any(read_config(folder), **overrides)
    with deferred_init(), torch.device("meta"):
        model = LlamaForCausalLM(config)
    load_hf(model, folder, device=device)
    return model
