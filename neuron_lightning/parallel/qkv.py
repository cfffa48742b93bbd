"""The query, key and value projection of grouped-query attention in one column-parallel layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_lightning.errors import ConfigError
from neuron_lightning.parallel import collectives
from neuron_lightning.parallel.initialize import Init, InitMethod, record
from neuron_lightning.parallel.layer_base import ParallelLayer
from neuron_lightning.parallel.linear import column_linear
from neuron_lightning.parallel.shards import extent_per_rank, mark_sharded, row_part
from neuron_lightning.parallel.spec import ShardPart

_NAMES = ("q", "k", "v")


class GQAQKVColumnParallelLinear(ParallelLayer):
    """Three linear maps of the same input, sharded by output features: queries, keys, values.

    With more ranks than key-value heads, pass ``kv_size_multiplier = m = tp / kv_heads``: each slice of the
    key and value weights is then held by m *consecutive* ranks, rank r holding slice ``r // m``. (NxD tiles
    instead: slice ``r mod (tp/m)``, with permuted query heads.) Contiguous is what lets query heads stay in
    their order: rank r's query heads use exactly the key-value head ``r // m``. The gradients of replicated
    rows are left partial; the optimizer (or ``allreduce_partial_grads``) sums them over the m ranks.

    Args:
        input_size: input features.
        output_sizes: ``[q, kv]`` output features of all ranks, replication not counted.
        bias: whether the maps have biases.
        gather_output: whether every rank gets all features (each key-value slice once).
        dtype: of the parameters.
        device: of the parameters; None: torch's default device.
        init_method: in-place function of one full (unfused) weight; None: as ``nn.Linear``.
        sequence_parallel_enabled: the input is this rank's part of the sequence.
        keep_master_weight: must be False.
        kv_size_multiplier: m above.
        fuse_qkv: one parameter ``weight_qkv`` and one product, instead of ``weight_q``, ``weight_k``,
            ``weight_v``. In checkpoints they are three in both cases.
        sequence_dimension: where the sequence is (None: 0); used under sequence parallel.
        reduce_dtype: input gradients are summed over ranks in this dtype if it is wider than their own.
        tensor_model_parallel_group: None or the tensor-parallel group of the current mesh.

    Attributes:
        local_sizes: output features of q, k and v on this rank.

    Raises:
        ConfigError: sizes that cannot be cut, or an argument that cannot work.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        bias: bool = True,
        gather_output: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        init_method: InitMethod | None = None,
        sequence_parallel_enabled: bool = False,
        keep_master_weight: bool = False,
        kv_size_multiplier: int = 1,
        fuse_qkv: bool = True,
        sequence_dimension: int | None = None,
        reduce_dtype: torch.dtype = torch.float32,
        tensor_model_parallel_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            sequence_parallel_enabled,
            sequence_dimension,
            reduce_dtype,
            tensor_model_parallel_group,
            keep_master_weight,
        )
        ranks, m = self.tensor_parallel_size, kv_size_multiplier
        _check_sizes(output_sizes, ranks, m)
        q, kv = output_sizes
        per_q = extent_per_rank(q, ranks, pad=False, what="query size (output_sizes[0])")
        per_kv = extent_per_rank(
            kv * m, ranks, pad=False, what="key-value size (output_sizes[1]) x kv_size_multiplier"
        )
        self.input_size, self.output_sizes = input_size, (q, kv)
        self.gather_output, self.fuse_qkv, self.kv_size_multiplier = gather_output, fuse_qkv, m
        self.has_bias = bias
        self.local_sizes = (per_q, per_kv, per_kv)
        leaves = ["weight"] + ["bias"] * bias
        for leaf, rest in zip(leaves, [(input_size,), ()], strict=False):
            self._allocate(leaf, rest, dtype, device)
        inits = {
            name: Init(method=init_method) if name.startswith("weight") else Init(fan_in=input_size)
            for name, _ in self.named_parameters(recurse=False)
        }
        record(self, inits)

    def _allocate(
        self, leaf: str, rest: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        """Makes the fused parameter or the three, with their specs."""
        groups = [_NAMES] if self.fuse_qkv else [(name,) for name in _NAMES]
        for names in groups:
            parts, start = [], 0
            for name in names:
                part = self._part(leaf, name, rest, start)
                parts.append(part)
                start += part.local_rows
            param = nn.Parameter(torch.empty(start, *rest, dtype=dtype, device=device))
            mark_sharded(param, parts, dim=0, stride=len(names), ranks=self.tensor_parallel_size)
            self.register_parameter(f"{leaf}_{''.join(names)}", param)

    def _part(self, leaf: str, name: str, rest: tuple[int, ...], start: int) -> ShardPart:
        m = 1 if name == "q" else self.kv_size_multiplier
        return row_part(
            name=f"{leaf}_{name}",
            global_shape=(self.output_sizes[0 if name == "q" else 1], *rest),
            per_rank=self.local_sizes[_NAMES.index(name)],
            index=self.tensor_parallel_rank // m,
            local_start=start,
            replicas=m,
        )

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projects. Every rank of the tensor-parallel group calls it together.

        Args:
            input: ``(…, input_size)``, the same on every rank; under sequence parallel this rank's part.

        Returns:
            ``q (…, q/tp)``, ``k`` and ``v (…, kv·m/tp)`` over the whole sequence, or with ``gather_output``
            ``(…, q)`` and ``(…, kv)``.
        """
        tp = self.tensor_parallel()
        weight, bias = self._rows("weight"), self._rows("bias") if self.has_bias else None
        if tp.size == 1:
            output = F.linear(input, weight, bias)
        else:
            output = column_linear(input, weight, bias, self.communication(tp, ()))
        q, k, v = output.split_with_sizes(self.local_sizes, dim=-1)
        if self.gather_output and tp.size > 1:
            gather = collectives.gather_from_tensor_model_parallel_region
            return gather(q), self._once(gather(k)), self._once(gather(v))
        return q, k, v

    def _rows(self, leaf: str) -> Tensor:
        """The weight or bias rows of all three maps in one tensor."""
        if self.fuse_qkv:
            return self.get_parameter(f"{leaf}_qkv")
        return torch.cat([self.get_parameter(f"{leaf}_{name}") for name in _NAMES])

    def _once(self, gathered: Tensor) -> Tensor:
        """Each replicated slice once."""
        m = self.kv_size_multiplier
        if m == 1:
            return gathered
        slices = torch.unflatten(gathered, -1, (self.tensor_parallel_size // m, m, -1))
        return slices[..., 0, :].flatten(-2)

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {list(self.output_sizes)}, tp={self.tensor_parallel_size}, "
            f"kv_size_multiplier={self.kv_size_multiplier}, fuse_qkv={self.fuse_qkv}, "
            f"sequence_parallel={self.sequence_parallel_enabled}"
        )


def _check_sizes(output_sizes: Sequence[int], ranks: int, m: int) -> None:
    if len(output_sizes) != 2:
        raise ConfigError(
            f"output_sizes has {len(output_sizes)} entries: it must be [query size, key-value size], the latter "
            "for keys and values alike."
        )
    if m < 1 or ranks % m:
        raise ConfigError(
            f"kv_size_multiplier {m} does not divide the tensor-parallel size {ranks}: it is the number of ranks "
            "that share a key-value head; use tensor-parallel size / key-value heads, or 1 where heads suffice."
        )
