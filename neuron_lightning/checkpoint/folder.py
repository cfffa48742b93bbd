"""Save and load a training run as a folder: what the strategy calls.

The folder is topology-free: it holds boxes of global tensors under canonical, unfused names, so that any
(tensor-parallel, data-parallel, ZeRO-1) layout loads what any other one wrote. It holds no pickle. Format,
protocol and limits are documented in ``docs/checkpoints.md``.

Every function that says "collective" must be called by all ranks of the default process group together, with
equal arguments where nothing else is said; a failure on one rank is the same :class:`CheckpointError` on all.
A single process without ``torch.distributed`` needs nothing special. The mesh is ``parallel.mesh.current()``.

An optimizer here is anything with ``param_groups``, ``export_state() -> list[ParamState]`` and
``import_state(list[ParamState]) -> None``, where a ``ParamState`` is a dataclass with the fields ``param``,
``start``, ``stop`` (flat range of the local parameter that this rank owns), ``tensors`` (flat, of
``stop - start`` elements, by key; ``"master"`` for fp32 weights) and ``scalars`` (floats by key). A fresh
optimizer lists every piece that it owns too, with no tensors (or only ``"master"``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``: ``stage`` is one of ``prepare, write, manifest, commit, verify, read``; the
other two are bytes on this rank (0, 0 for stages without a size)."""


def write_checkpoint(
    path: str | Path,
    *,
    module_state: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimizers: Sequence[Any] = (),
    trainer_state: Mapping[str, Any],
    rank_state: Mapping[str, Any] | None = None,
    state_dict_type: str = "deduped",
    progress: Progress | None = None,
) -> None:
    """Writes one checkpoint folder and commits it. Collective.

    Args:
        path: the folder to create; a committed checkpoint of that name is replaced atomically.
        module_state: local tensors by name as ``module.state_dict()`` gives them, buffers included (buffers
            are taken from the lowest rank).
        parameters: ``dict(module.named_parameters())`` of the same module: where the shard specs are.
        optimizers: in the order in which they will be loaded; empty for weights only.
        trainer_state: everything else that is the same on all ranks (rank 0's is written); the keys
            ``global_step`` and ``epoch``, where present, are copied into the manifest.
        rank_state: what differs by rank (random states); readable with :func:`read_rank_state`.
        state_dict_type: ``"deduped"`` (each element is written once, shared out evenly over the ranks that hold
            it) or ``"sharded"`` (every rank writes all that it holds).
        progress: called on every rank while it works.

    Raises:
        CheckpointError: on all ranks, with the first cause; nothing is left behind, and a checkpoint that was at
            ``path`` before is untouched.
    """
    raise NotImplementedError


def read_trainer_state(path: str | Path) -> dict[str, Any]:
    """The ``trainer_state`` of a checkpoint, tensors on the CPU. Not collective.

    Raises:
        CheckpointError: not a checkpoint, or damaged (the file is named).
    """
    raise NotImplementedError


def read_rank_state(path: str | Path, rank: int) -> dict[str, Any] | None:
    """What ``rank`` gave as ``rank_state``; None if it gave none or did not exist. Not collective."""
    raise NotImplementedError


def load_module_state(
    path: str | Path,
    targets: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    *,
    strict: bool = True,
    verify: bool = True,
    progress: Progress | None = None,
) -> tuple[list[str], list[str]]:
    """Copies a checkpoint's weights and buffers into local tensors, in place, whatever layout wrote it. Collective.

    Args:
        path: the checkpoint folder.
        targets: local tensors by name, as ``module.state_dict()`` gives them.
        parameters: ``dict(module.named_parameters())`` of the same module.
        strict: whether a missing or unexpected name is an error.
        verify: whether the hashes of the files that hold weights are checked first (each file by one rank).
        progress: called on every rank while it works.

    Returns:
        The canonical names that the module has and the checkpoint has not, and the other way round.

    Raises:
        CheckpointError: damaged, or of another model: the first differing names and shapes are listed.
    """
    raise NotImplementedError


def load_optimizer_state(
    path: str | Path,
    optimizers: Sequence[Any],
    parameters: Mapping[str, nn.Parameter],
    *,
    verify: bool = True,
    progress: Progress | None = None,
) -> None:
    """Gives every optimizer its state and its groups' hyper-parameters back, resharded as needed. Collective.

    Call it after :func:`load_module_state`: master weights that the checkpoint lacks are made from its weights.

    Raises:
        CheckpointError: damaged, without optimizer state, or of other optimizers.
    """
    raise NotImplementedError


def check_trainer_state(state: Mapping[str, Any]) -> None:
    """Checks that ``state`` can be written, without writing it; for an early error. Not collective.

    Raises:
        CheckpointError: naming the key path of the first value that cannot be stored.
    """
    raise NotImplementedError


def is_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` is a committed checkpoint folder of ours (its contents are not verified)."""
    raise NotImplementedError


def remove_checkpoint(path: str | Path) -> None:
    """Deletes a checkpoint, un-committing it first by a rename; one rank calls it. No error if there is none."""
    raise NotImplementedError
