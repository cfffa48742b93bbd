"""The ``.metadata`` of a ``torch.distributed.checkpoint`` folder, read without running code.

The file is a pickle of dataclasses. The unpickler here knows these dataclasses, sizes, dtypes and layouts; whatever
else the file asks for is refused before it is called.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from neuron_lightning.checkpoint import commit
from neuron_lightning.errors import CheckpointError

METADATA = ".metadata"
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
    "pathlib._local": {"Path", "PosixPath"},
}
_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    ImportError,
)
_FILE_NAME = re.compile(r"[\w.-]+", re.ASCII)


class _Unpickler(pickle.Unpickler):
    """Finds the listed classes and torch's dtypes only."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        found = None
        if global_name in _CLASSES.get(module_name, ()):
            found = super().find_class(module_name, global_name)
        elif module_name == "torch":
            found = getattr(torch, global_name, None)
            found = found if isinstance(found, torch.dtype) else None
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return found


def read(folder: Path) -> Metadata:
    """The metadata of a folder.

    Raises:
        CheckpointError: missing, damaged, or it asks for other classes, or for files outside the folder.
    """
    path = folder / METADATA
    commit.require_regular(path)
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except _ERRORS as error:
        raise CheckpointError(
            f"{path} is refused ({str(error)[:300]}): it is not what torch.distributed.checkpoint writes, or it holds "
            "code or foreign classes, which are never unpickled here."
        ) from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} holds a {type(metadata).__name__}, not torch's Metadata.")
    for info in (metadata.storage_data or {}).values():
        name = str(getattr(info, "relative_path", ""))
        if not _FILE_NAME.fullmatch(name) or name in (".", ".."):
            raise CheckpointError(
                f"{path} names the file {name[:200]!r}, which is not in its folder: refused."
            )
    return metadata


def place(metadata: Metadata, key: str) -> tuple[str, ...]:
    """Where ``key`` stood in the nested dictionary that was saved; guessed from its dots if it is not recorded."""
    recorded = (metadata.planner_data or {}).get(key) if isinstance(metadata.planner_data, dict) else None
    if recorded:
        return tuple(str(part) for part in recorded)
    root, _, rest = key.partition(".")
    if root in ("model", "state_dict") and rest and _all_below(metadata, root):
        return (root, rest)
    if found := re.fullmatch(r"(optimizer(?:[._]?\d+)?)\.state\.(.+)\.([^.]+)", key):
        return (found[1], "state", found[2], found[3])
    return (key,)


def _all_below(metadata: Metadata, root: str) -> bool:
    """Whether ``root`` holds all tensors but the optimizer's: else it is a part of a module's name."""
    others = [k for k in metadata.state_dict_metadata if not k.startswith(("optimizer", f"{root}."))]
    return not others
