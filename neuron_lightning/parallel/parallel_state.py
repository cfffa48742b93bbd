"""NxD's ``parallel_state``, as a read-only view of the current mesh.

Function names, argument names and the order of ranks are NxD's (tensor fastest, pipeline slowest), so that
scripts written for it need no change.
"""

from __future__ import annotations

from typing import Literal, overload

import torch.distributed as dist

from neuron_lightning.parallel import mesh as _mesh

__all__ = [
    "destroy_model_parallel",
    "get_context_model_parallel_group",
    "get_context_model_parallel_rank",
    "get_context_model_parallel_size",
    "get_context_model_parallel_src_tgt_pairs",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_replica_groups",
    "get_data_parallel_size",
    "get_expert_model_parallel_group",
    "get_expert_model_parallel_rank",
    "get_expert_model_parallel_size",
    "get_pipeline_model_parallel_group",
    "get_pipeline_model_parallel_rank",
    "get_pipeline_model_parallel_size",
    "get_rank_info_str",
    "get_tensor_model_parallel_group",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_replica_groups",
    "get_tensor_model_parallel_size",
    "get_tensor_model_parallel_src_rank",
    "initialize_model_parallel",
    "model_parallel_is_initialized",
    "rmsg",
]

Group = dist.ProcessGroup | None


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    *,
    sequence_parallel: bool = False,
) -> None:
    """Lays the ranks of the default process group out. Every rank calls it together, with equal arguments.

    Args:
        tensor_model_parallel_size: ranks that share one copy of the weights.
        pipeline_model_parallel_size: must be 1 in this release.
        context_parallel_size: must be 1 in this release.
        expert_model_parallel_size: must be 1 in this release.
        sequence_parallel: default for layers and models that are not told otherwise.

    Raises:
        ParallelStateError: initialised already, or the world size is not divisible.
    """
    _mesh.initialize(
        tp=tensor_model_parallel_size,
        pp=pipeline_model_parallel_size,
        cp=context_parallel_size,
        ep=expert_model_parallel_size,
        sequence_parallel=sequence_parallel,
    )


def model_parallel_is_initialized() -> bool:
    """Whether :func:`initialize_model_parallel` ran and was not undone."""
    return _mesh.is_initialized()


def destroy_model_parallel() -> None:
    """Undoes :func:`initialize_model_parallel`: groups are destroyed, a new layout may be built."""
    _mesh.destroy()


def get_tensor_model_parallel_size() -> int:
    """Ranks of a tensor-parallel group."""
    return _mesh.current().sizes["tp"]


def get_tensor_model_parallel_rank() -> int:
    """This rank's position in its tensor-parallel group."""
    return _mesh.current().coordinates["tp"]


def get_tensor_model_parallel_src_rank() -> int:
    """Global rank of the first member of this rank's tensor-parallel group."""
    return _mesh.current().group_ranks("tp")[0]


def get_tensor_model_parallel_replica_groups() -> list[list[int]]:
    """Global ranks of every tensor-parallel group."""
    return _mesh.current().replica_groups("tp")


@overload
def get_tensor_model_parallel_group(as_list: Literal[False] = False) -> Group: ...
@overload
def get_tensor_model_parallel_group(as_list: Literal[True]) -> list[list[int]]: ...
def get_tensor_model_parallel_group(as_list: bool = False) -> Group | list[list[int]]:
    """The tensor-parallel group, or with ``as_list`` the global ranks of all of them."""
    return _group_or_list("tp", as_list)


def get_data_parallel_size() -> int:
    """Number of data-parallel replicas."""
    return _mesh.current().sizes["dp"]


def get_data_parallel_rank() -> int:
    """This rank's position among the data-parallel replicas."""
    return _mesh.current().coordinates["dp"]


def get_data_parallel_replica_groups() -> list[list[int]]:
    """Global ranks of every data-parallel group."""
    return _mesh.current().replica_groups("dp")


@overload
def get_data_parallel_group(as_list: Literal[False] = False) -> Group: ...
@overload
def get_data_parallel_group(as_list: Literal[True]) -> list[list[int]]: ...
def get_data_parallel_group(as_list: bool = False) -> Group | list[list[int]]:
    """The data-parallel group, or with ``as_list`` the global ranks of all of them."""
    return _group_or_list("dp", as_list)


def get_pipeline_model_parallel_size() -> int:
    """Number of pipeline stages (1 in this release)."""
    return _mesh.current().sizes["pp"]


def get_pipeline_model_parallel_rank() -> int:
    """This rank's pipeline stage."""
    return _mesh.current().coordinates["pp"]


@overload
def get_pipeline_model_parallel_group(as_list: Literal[False] = False) -> Group: ...
@overload
def get_pipeline_model_parallel_group(as_list: Literal[True]) -> list[list[int]]: ...
def get_pipeline_model_parallel_group(as_list: bool = False) -> Group | list[list[int]]:
    """The pipeline group, or with ``as_list`` the global ranks of all of them."""
    return _group_or_list("pp", as_list)


def get_context_model_parallel_size() -> int:
    """Ranks that share one sequence (1 in this release)."""
    return _mesh.current().sizes["cp"]


def get_context_model_parallel_rank() -> int:
    """This rank's position among those that share its sequence."""
    return _mesh.current().coordinates["cp"]


@overload
def get_context_model_parallel_group(as_list: Literal[False] = False) -> Group: ...
@overload
def get_context_model_parallel_group(as_list: Literal[True]) -> list[list[int]]: ...
def get_context_model_parallel_group(as_list: bool = False) -> Group | list[list[int]]:
    """The context-parallel group, or with ``as_list`` the global ranks of all of them."""
    return _group_or_list("cp", as_list)


def get_context_model_parallel_src_tgt_pairs() -> list[tuple[int, int]]:
    """(source, target) global ranks of one step around each context-parallel ring."""
    rings = _mesh.current().replica_groups("cp")
    return [(ring[i], ring[(i + 1) % len(ring)]) for ring in rings for i in range(len(ring))]


def get_expert_model_parallel_size() -> int:
    """Ranks that share one set of experts (1 in this release)."""
    return _mesh.current().sizes["ep"]


def get_expert_model_parallel_rank() -> int:
    """This rank's position among those that share its experts."""
    return _mesh.current().coordinates["ep"]


@overload
def get_expert_model_parallel_group(as_list: Literal[False] = False) -> Group: ...
@overload
def get_expert_model_parallel_group(as_list: Literal[True]) -> list[list[int]]: ...
def get_expert_model_parallel_group(as_list: bool = False) -> Group | list[list[int]]:
    """The expert-parallel group, or with ``as_list`` the global ranks of all of them."""
    return _group_or_list("ep", as_list)


def get_rank_info_str() -> str:
    """This rank's coordinates, for log lines: ``rank 3: pp 0, dp 1, cp 0, ep 0, tp 1``."""
    mesh = _mesh.current()
    return f"rank {mesh.rank}: " + ", ".join(f"{a} {mesh.coordinates[a]}" for a in _mesh.AXES)


def rmsg(message: str) -> str:
    """Prefixes a log message with :func:`get_rank_info_str`."""
    return f"[{get_rank_info_str()}] {message}"


def _group_or_list(axis: str, as_list: bool) -> Group | list[list[int]]:
    mesh = _mesh.current()
    return mesh.replica_groups(axis) if as_list else mesh.group(axis)
