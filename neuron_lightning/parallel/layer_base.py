"""What the parallel layers share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from neuron_lightning.errors import ConfigError, ParallelStateError
from neuron_lightning.parallel import collectives
from neuron_lightning.parallel.collectives import TensorParallel
from neuron_lightning.parallel.linear import Communication


class ParallelLayer(nn.Module):
    """What the layers share: their group, and where the sequence is.

    Attributes:
        tensor_parallel_size: ranks that the layer was built for.
        sequence_parallel_enabled: whether activations outside are sharded along the sequence.
        sequence_dimension: where the sequence is then.
    """

    def __init__(
        self,
        sequence_parallel_enabled: bool,
        sequence_dimension: int | None,
        reduce_dtype: torch.dtype,
        group: dist.ProcessGroup | None,
        keep_master_weight: bool = False,
    ) -> None:
        super().__init__()
        tp = collectives.tensor_parallel()
        if group is not None and tp.size > 1 and group is not tp.group:
            raise ConfigError(
                "tensor_model_parallel_group is not the tensor-parallel group of the current mesh: layers use "
                "that one; leave the argument out."
            )
        if keep_master_weight:
            raise ConfigError(
                "keep_master_weight=True is not supported: every rank draws its slice by name and no full copy "
                "exists. Leave it out; for fp32 master weights set mixed_precision_config.use_master_weights."
            )
        self.tensor_parallel_size = tp.size
        self.tensor_parallel_rank = tp.rank
        self.sequence_parallel_enabled = sequence_parallel_enabled
        self.sequence_dimension = 0 if sequence_dimension is None else sequence_dimension
        self.reduce_dtype = reduce_dtype

    def tensor_parallel(self) -> TensorParallel:
        """The group; an error if the mesh has changed since the layer was built."""
        tp = collectives.tensor_parallel()
        if tp.size != self.tensor_parallel_size:
            raise ParallelStateError(
                f"{type(self).__name__} was built for tensor-parallel size {self.tensor_parallel_size}, but the "
                f"current mesh has {tp.size}: build the model after initialize_model_parallel()."
            )
        return tp

    def communication(
        self, tp: TensorParallel, padding: tuple[tuple[int, int], ...], reduce_output: bool = True
    ) -> Communication:
        """How the layer's product exchanges activations."""
        return Communication(
            tp=tp,
            sequence_dim=self.sequence_dimension if self.sequence_parallel_enabled else None,
            reduce_dtype=self.reduce_dtype,
            padding=padding,
            reduce_output=reduce_output,
        )
