"""Reduction of gradients over the data- and tensor-parallel groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from neuron_lightning.backends import get_backend
from neuron_lightning.optim.bucket import Bucket
from neuron_lightning.optim.norm import weighted_square_sum
from neuron_lightning.parallel.mesh import Mesh


class Reducer:
    """All communication of an optimizer step, over the mesh that was current when the optimizer was made.

    Args:
        mesh: the layout.
        buckets: the storage.
        subgroup_sizes: every ``grad_ranks`` above 1 that occurs in the model, the same list on every rank.
        sharded: slices are spread over data-parallel ranks (ZeRO-1), not held whole by each.

    Every rank constructs it together, and calls each method together.
    """

    def __init__(
        self, mesh: Mesh, buckets: Sequence[Bucket], *, subgroup_sizes: list[int], sharded: bool
    ) -> None:
        self.num_replicas = mesh.sizes["dp"]
        self._mesh = mesh
        self._buckets = buckets
        self._sharded = sharded
        self._backend = get_backend()
        self._groups = {size: mesh.tensor_subgroup(size) for size in subgroup_sizes}

    def agree(self, received: list[bool]) -> list[bool]:
        """Which parameters got a gradient on any data-parallel rank (one small collective on the host)."""
        if self.num_replicas == 1:
            return received
        flags = numpy.array(received, dtype=numpy.uint8)  # host memory, whatever torch's default device is
        dist.all_reduce(torch.from_numpy(flags), op=dist.ReduceOp.MAX, group=self._mesh.group("dp"))
        return flags.astype(bool).tolist()  # type: ignore[no-any-return]

    def average_gradients(self) -> None:
        """Averages over data-parallel ranks, each element where it is updated; completes partial sums."""
        partial: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for bucket in self._buckets:
            bucket.average(self._backend, self._mesh.group("dp"), self.num_replicas)
            for part, run in bucket.terms():
                if run.grad_ranks > 1:
                    partial[run.grad_ranks, part.dtype, part.device].append(part)
        for (size, _, _), parts in partial.items():
            group = self._groups[size]
            if group is None:
                continue
            flat = torch.cat([part.reshape(-1) for part in parts])
            self._backend.all_reduce(flat, group)
            for part, total in zip(parts, torch.split(flat, [t.numel() for t in parts]), strict=True):
                part.copy_(total)

    def norm(self) -> Tensor:
        """L2 norm of the averaged gradients of the whole model: a 0-d device tensor, the same on every rank."""
        wide = any(bucket.grad_dtype == torch.float64 for bucket in self._buckets)
        total = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=self._device)
        for bucket in self._buckets:
            terms = ((part, 1.0 / run.replicas) for part, run in bucket.terms())
            total = weighted_square_sum(terms, total)
        if self._sharded and self.num_replicas > 1:
            everyone = self._mesh.sizes["tp"] > 1
            self._backend.all_reduce(total, dist.group.WORLD if everyone else self._mesh.group("dp"))
        elif self._mesh.sizes["tp"] > 1:
            self._backend.all_reduce(total, self._mesh.group("tp"))
        return total.sqrt()

    def found_inf(self) -> Tensor:
        """1.0 if any gradient on any rank is infinite or not a number, else 0.0 (0-d fp32 device tensor)."""
        found = torch.zeros((), dtype=torch.float32, device=self._device)
        for bucket in self._buckets:
            for grads in bucket.reduced():
                found = torch.maximum(found, (~torch.isfinite(grads)).any().to(found))
        if self._mesh.world_size > 1:
            self._backend.all_reduce(found, dist.group.WORLD, dist.ReduceOp.MAX)
        return found

    def gather_weights(self, bucket: Bucket) -> dist.Work | None:
        """Starts to collect every rank's updated slice of ``bucket``; returns what to wait for."""
        if not self._sharded or self.num_replicas == 1:
            return None
        return bucket.gather(self._backend, self._mesh.group("dp"))

    def sum_over_replicas(self, tensor: Tensor) -> Tensor:
        """Sums ``tensor`` in place over the data-parallel ranks; returns it."""
        if self.num_replicas > 1:
            self._backend.all_reduce(tensor, self._mesh.group("dp"))
        return tensor

    @property
    def _device(self) -> torch.device:
        return self._buckets[0].device if self._buckets else torch.device("cpu")
