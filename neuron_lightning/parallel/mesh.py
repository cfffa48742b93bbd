"""The grid of ranks and its process groups.

One :class:`Mesh` per process, axes from slowest to fastest ``pp, dp, cp, ep, tp``: consecutive ranks are
tensor-parallel neighbours, as NxD orders them. Everything that needs a group asks the current mesh for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from neuron_lightning.backends import get_backend
from neuron_lightning.errors import ParallelStateError

AXES = ("pp", "dp", "cp", "ep", "tp")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Sizes, coordinates and groups of the current parallel layout.

    Attributes:
        sizes: ranks along each axis.
        coordinates: this rank's position along each axis.
        rank: global rank.
        world_size: product of all sizes.
        sequence_parallel: default of layers and models that are not told otherwise.
        device_mesh: the DeviceMesh behind it; None in a single process without torch.distributed.
    """

    sizes: Mapping[str, int]
    coordinates: Mapping[str, int]
    rank: int = 0
    world_size: int = 1
    sequence_parallel: bool = False
    device_mesh: DeviceMesh | None = None
    _replica_groups: dict[int, dist.ProcessGroup] = field(default_factory=dict, repr=False)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """Process group of this rank along ``axis``; None without torch.distributed."""
        _check_axis(axis)
        return None if self.device_mesh is None else self.device_mesh.get_group(axis)

    def replica_groups(self, axis: str) -> list[list[int]]:
        """The global ranks of every group along ``axis``, each in the axis' order."""
        stride, size = self._stride(axis), self.sizes[_check_axis(axis)]
        starts = [r for r in range(self.world_size) if (r // stride) % size == 0]
        return [[start + i * stride for i in range(size)] for start in starts]

    def group_ranks(self, axis: str) -> list[int]:
        """Global ranks of this rank's own group along ``axis``."""
        return next(ranks for ranks in self.replica_groups(axis) if self.rank in ranks)

    def tensor_subgroup(self, size: int) -> dist.ProcessGroup | None:
        """Group of ``size`` consecutive tensor-parallel ranks that this rank is in (made once, then reused).

        Every rank calls it together the first time a size is asked for.
        """
        if self.device_mesh is None or size == 1:
            return None
        if self.sizes["tp"] % size:
            raise ParallelStateError(
                f"a tensor-parallel group of {self.sizes['tp']} ranks cannot be cut into groups of {size}."
            )
        if size == self.sizes["tp"]:
            return self.group("tp")
        if size not in self._replica_groups:
            cuts = [
                ranks[i : i + size] for ranks in self.replica_groups("tp") for i in range(0, len(ranks), size)
            ]
            mine, _ = dist.new_subgroups_by_enumeration(cuts)  # type: ignore[no-untyped-call]
            get_backend().adopt_group(mine, cuts)
            self._replica_groups[size] = mine
        return self._replica_groups[size]

    def _stride(self, axis: str) -> int:
        stride = 1
        for faster in AXES[AXES.index(_check_axis(axis)) + 1 :]:
            stride *= self.sizes[faster]
        return stride


class _Holder:
    """The one holder of the current mesh."""

    mesh: Mesh | None = None


_SINGLE = Mesh(sizes=dict.fromkeys(AXES, 1), coordinates=dict.fromkeys(AXES, 0))


def initialize(
    *, tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1, sequence_parallel: bool = False
) -> Mesh:
    """Builds the mesh over all ranks of the default process group and makes it current.

    Every rank calls it together, with the same arguments. The data-parallel size is what remains.

    Raises:
        ParallelStateError: a mesh exists already, or the world size is not divisible by ``tp``.
    """
    if _Holder.mesh is not None:
        raise ParallelStateError(
            f"model parallel is already initialised ({describe(_Holder.mesh)}): a process holds one layout at a "
            "time; call parallel_state.destroy_model_parallel() first."
        )
    if any(size != 1 for size in (pp, cp, ep)):
        raise ParallelStateError(
            f"pipeline ({pp}), context ({cp}) and expert ({ep}) parallel sizes must be 1 in this release."
        )
    if tp < 1:
        raise ParallelStateError(f"tensor_parallel_size must be a positive integer, not {tp!r}.")
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % tp:
        divisors = [d for d in range(1, world + 1) if world % d == 0]
        raise ParallelStateError(
            f"world size {world} is not divisible by tensor_parallel_size {tp}: the ranks form whole "
            f"tensor-parallel groups; launch a multiple of {tp} ranks, or choose a size from {divisors}."
        )
    _Holder.mesh = _build({"pp": 1, "dp": world // tp, "cp": 1, "ep": 1, "tp": tp}, sequence_parallel)
    return _Holder.mesh


def _build(sizes: dict[str, int], sequence_parallel: bool) -> Mesh:
    if not dist.is_initialized():
        return Mesh(sizes=sizes, coordinates=dict.fromkeys(AXES, 0), sequence_parallel=sequence_parallel)
    device_mesh = init_device_mesh(
        get_backend().mesh_device_type, tuple(sizes[a] for a in AXES), mesh_dim_names=AXES
    )
    mesh = Mesh(
        sizes=sizes,
        coordinates={axis: device_mesh.get_local_rank(axis) for axis in AXES},
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        sequence_parallel=sequence_parallel,
        device_mesh=device_mesh,
    )
    for axis in AXES:
        get_backend().adopt_group(mesh.group(axis), mesh.replica_groups(axis))
    return mesh


def is_initialized() -> bool:
    """Whether a mesh has been built and not destroyed."""
    return _Holder.mesh is not None


def current() -> Mesh:
    """The current mesh; in a single process that never built one, the trivial mesh of one rank.

    Raises:
        ParallelStateError: several ranks exist, but nobody said how to lay them out.
    """
    if _Holder.mesh is not None:
        return _Holder.mesh
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ParallelStateError(
            f"model parallel is not initialised, but {dist.get_world_size()} ranks exist: call "
            "parallel_state.initialize_model_parallel(tensor_model_parallel_size=…) on every rank first "
            "(NeuronXLAStrategy does it for you)."
        )
    return _SINGLE


def destroy() -> None:
    """Forgets the mesh and destroys the groups made for it (the default group stays). All ranks together."""
    mesh, _Holder.mesh = _Holder.mesh, None
    if mesh is None or mesh.device_mesh is None or not dist.is_initialized():
        return
    groups = {mesh.device_mesh.get_group(axis) for axis in AXES} | set(mesh._replica_groups.values())
    for group in groups:
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def describe(mesh: Mesh) -> str:
    """``tp=2 x dp=2`` and the like."""
    shown = [f"{axis}={mesh.sizes[axis]}" for axis in reversed(AXES) if mesh.sizes[axis] > 1]
    return " x ".join(shown) if shown else "one rank"


def _check_axis(axis: str) -> str:
    if axis not in AXES:
        raise ParallelStateError(f"unknown mesh axis {axis!r}: the axes are {', '.join(AXES)}.")
    return axis
