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

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuron_lightning.checkpoint import boxes, reader, restore, state, storage, typed_json, writer
from neuron_lightning.checkpoint.exchange import Ranks
from neuron_lightning.checkpoint.host_copies import HostCopies, landing
from neuron_lightning.checkpoint.manifest import KINDS
from neuron_lightning.checkpoint.plan import Planner, Request, file_name
from neuron_lightning.checkpoint.reader import Checkpoint
from neuron_lightning.checkpoint.transfer import Want
from neuron_lightning.parallel.mesh import current as current_mesh

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
    averages: Mapping[str, Mapping[str, Tensor]] | None = None,
    state_dict_type: str = "deduped",
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    planner: Planner | None = None,
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
        averages: further sets of the module's weights (EMA, SWA) by key, each named and sharded as
            ``module_state``; readable with :func:`load_average_state`.
        state_dict_type: ``"deduped"`` (each element is written once, shared out evenly over the ranks that hold
            it) or ``"sharded"`` (every rank writes all that it holds).
        progress: called on every rank while it works.
        ranks: who saves together; the default process group where it is None.
        planner: for a caller that saves the same tensors again and again, the one that it keeps: what has not moved
            since the save before is not planned anew.

    Raises:
        CheckpointError: on all ranks, with the first cause; nothing is left behind, and a checkpoint that was at
            ``path`` before is untouched.
    """
    request = request_for(
        path,
        module_state=module_state,
        parameters=parameters,
        optimizers=optimizers,
        trainer_state=trainer_state,
        rank_state=rank_state,
        averages=averages,
        state_dict_type=state_dict_type,
    )
    place, ranks = storage.place(path), ranks or Ranks()
    share = (planner or Planner()).plan(request, ranks, f"save the checkpoint {place.name}")
    writer.write(request, share, writer.live_data(share), place, ranks, progress or _silent)


def request_for(
    path: str | Path,
    *,
    module_state: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    optimizers: Sequence[Any] = (),
    trainer_state: Mapping[str, Any],
    rank_state: Mapping[str, Any] | None = None,
    averages: Mapping[str, Mapping[str, Tensor]] | None = None,
    state_dict_type: str = "deduped",
) -> Request:
    """What is to be written, for arguments as :func:`write_checkpoint` takes them; looks at nothing yet."""
    mesh = current_mesh()

    modules = {"model": module_state}
    modules |= {state.average_prefix(key): tensors for key, tensors in (averages or {}).items()}

    def describe(known: state.LocalState | None) -> state.LocalState:
        return state.describe(modules, optimizers, parameters, mesh.sizes["tp"], known)

    def trainer() -> dict[str, Any]:
        groups = [state.group_options(optimizer, parameters) for optimizer in optimizers]
        return {"trainer": dict(trainer_state), "optimizers": groups}

    return Request(
        target=storage.place(path).name,
        describe=describe,
        trainer=trainer,
        rank=rank_state,
        step=trainer_state.get("global_step"),
        epoch=trainer_state.get("epoch"),
        data=copy.deepcopy(trainer_state.get("data_position")),
        mesh=dict(mesh.sizes),
        state_dict_type=state_dict_type,
    )


def read_trainer_state(path: str | Path) -> dict[str, Any]:
    """The ``trainer_state`` of a checkpoint, tensors on the CPU. Not collective.

    Raises:
        CheckpointError: not a checkpoint, or damaged (the file is named).
    """
    return dict(Checkpoint(path).read_trainer()["trainer"])


def read_rank_state(path: str | Path, rank: int) -> dict[str, Any] | None:
    """What ``rank`` gave as ``rank_state``; None if it gave none or did not exist. Not collective."""
    checkpoint = Checkpoint(path)
    name = file_name(rank, "state", "json")
    return None if checkpoint.file(name) is None else checkpoint.read_document(name)


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
    ranks = Ranks()
    tp_size = current_mesh().sizes["tp"]
    plans: list[restore.ModulePlan] = []

    def plan(checkpoint: Checkpoint) -> list[Want]:
        plans.append(restore.plan_module(checkpoint, into, parameters, tp_size, strict))
        return plans[0].wants

    kinds = ("model",) if verify else ()
    with landing(targets) as into:
        reader.load(path, plan, kinds, f"load the weights of {path}", ranks, progress or _silent)
    return plans[0].missing, plans[0].unexpected


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
    ranks = Ranks()
    tp_size = current_mesh().sizes["tp"]

    copies: list[HostCopies] = []

    def plan(checkpoint: Checkpoint) -> list[Want]:
        return restore.plan_optimizers(checkpoint, optimizers, parameters, tp_size, copies)

    kinds = ("optimizer", "trainer") if verify else ()
    reader.load(path, plan, kinds, f"load the optimizer state of {path}", ranks, progress or _silent)
    for one in copies:
        one.put_back()


def load_average_state(
    path: str | Path,
    key: str,
    targets: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    *,
    verify: bool = True,
    progress: Progress | None = None,
) -> None:
    """Copies a set of ``averages`` into local tensors, in place, whatever layout wrote it. Collective.

    Args:
        path: the checkpoint folder.
        key: as :func:`write_checkpoint` was given it.
        targets: local tensors by the names of the module's state; not the module's own, but of the same shapes.
        parameters: ``dict(module.named_parameters())`` of the module.
        verify: whether the hashes of the files that hold them are checked first.
        progress: called on every rank while it works.

    Raises:
        CheckpointError: damaged, without such a set, or of another model.
    """
    ranks = Ranks()
    tp_size, prefix = current_mesh().sizes["tp"], state.average_prefix(key)

    def plan(checkpoint: Checkpoint) -> list[Want]:
        return restore.plan_module(checkpoint, into, parameters, tp_size, True, prefix).wants

    kinds, what = ("optimizer",) if verify else (), f"load the averaged weights {key} of {path}"
    with landing(targets) as into:
        reader.load(path, plan, kinds, what, ranks, progress or _silent)


def check_trainer_state(values: Mapping[str, Any]) -> None:
    """Checks that ``values`` can be written, without writing it; for an early error. Not collective.

    Raises:
        CheckpointError: naming the key path of the first value that cannot be stored.
    """
    typed_json.encode(dict(values), where="trainer state")


def read_full_state(path: str | Path, *, verify: bool = True) -> dict[str, Tensor]:
    """All weights and buffers as whole global tensors on the CPU, by canonical name. Not collective.

    Tied names share one tensor. For exports and for tools: it needs the memory of the whole model.
    """
    full: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}

    def plan(checkpoint: Checkpoint) -> list[Want]:
        wants = []
        aliases.update(checkpoint.manifest.aliases)
        for name in checkpoint.manifest.tensors:
            if not name.startswith("model/"):
                continue
            record = checkpoint.manifest.tensors[name]
            full[name] = torch.empty(record.shape, dtype=record.dtype, device="cpu")
            wants += checkpoint.wants(record, boxes.whole(record.shape), full[name])
        return wants

    kinds = ("model",) if verify else ()
    reader.load(path, plan, kinds, f"read {path}", Ranks.alone(), _silent)
    full.update({alias: full[name] for alias, name in aliases.items()})
    return {name.removeprefix("model/"): tensor for name, tensor in full.items()}


def verify_checkpoint(path: str | Path, progress: Progress | None = None, ranks: Ranks | None = None) -> None:
    """Checks every file of a checkpoint against its hash, each file by one rank. Collective.

    Raises:
        CheckpointError: on all ranks, naming the first file that is damaged, missing, a link or not listed.
    """
    ranks = ranks or Ranks()
    reader.verify(path, KINDS, ranks, progress or _silent)


def is_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` is a committed checkpoint folder of ours (its contents are not verified)."""
    return storage.place(path).is_committed()


def remove_checkpoint(path: str | Path) -> None:
    """Deletes a checkpoint, un-committing it first by a rename; one rank calls it. No error if there is none."""
    storage.place(path).remove()


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""
