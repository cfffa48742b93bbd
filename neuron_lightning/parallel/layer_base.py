"""What the parallel layers share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuron_lightning.errors import ConfigError, ParallelStateError
from neuron_lightning.parallel import collectives
from neuron_lightning.parallel.collectives import TensorParallel
from neuron_lightning.parallel.initialize import mark_drawn
from neuron_lightning.parallel.linear import Communication


class MarkedModule(nn.Module):
    """A module whose parameters keep their marks (spec, NxD's attributes, how they are drawn) when replaced.

    torch makes new parameters, without the attributes of the old, in ``copy.deepcopy``, ``to_empty`` and
    ``load_state_dict(assign=True)``; a shard that lost its spec would count as a full copy. What
    ``load_state_dict`` has filled counts as drawn.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        marks = self._marks()
        result: nn.Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._restore(marks)
        return result

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        marks = self._marks()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._restore(marks)
        for leaf, param in self._parameters.items():
            if param is not None and f"{prefix}{leaf}" in state_dict:
                mark_drawn(param)

    def __deepcopy__(self, memo: dict[int, Any]) -> MarkedModule:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        twin._restore(self._marks())
        return twin

    def _marks(self) -> dict[str, dict[str, Any]]:
        return {leaf: dict(p.__dict__) for leaf, p in self._parameters.items() if p is not None}

    def _restore(self, marks: Mapping[str, Mapping[str, Any]]) -> None:
        for leaf, attributes in marks.items():
            param = self._parameters.get(leaf)
            if param is not None:
                param.__dict__.update({k: v for k, v in attributes.items() if k not in param.__dict__})


class ParallelLayer(MarkedModule):
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
