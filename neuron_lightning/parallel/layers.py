"""The tensor-parallel layers: linear maps cut by output or by input features, and the embedding.

Signatures are NxD's. The layers hold plain local tensors and call collectives of the current mesh in
``forward`` and ``backward``: every rank of the tensor-parallel group calls them together, in the same order.
With one rank they are ``nn.Linear`` and ``nn.Embedding``.

Under sequence parallel (``sequence_parallel_enabled``) activations between the parallel regions are sharded
along the sequence, by default dimension 0: ``(seq/tp, batch, hidden)``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_lightning.errors import ConfigError
from neuron_lightning.parallel import collectives
from neuron_lightning.parallel.embedding import ParallelEmbedding
from neuron_lightning.parallel.initialize import Init, InitMethod, record
from neuron_lightning.parallel.layer_base import ParallelLayer
from neuron_lightning.parallel.linear import column_linear, row_linear
from neuron_lightning.parallel.shards import (
    column_part,
    extent_per_rank,
    mark_sharded,
    padding_runs,
    row_part,
)

__all__ = ["ColumnParallelLinear", "ParallelEmbedding", "ParallelLayer", "RowParallelLinear"]


class ColumnParallelLinear(ParallelLayer):
    """A linear map whose output features are cut over the ranks: ``y = x Wᵀ + b``, W sharded by rows.

    Args:
        input_size: input features.
        output_size: output features of all ranks together, padding not counted.
        bias: whether there is one (sharded like the output).
        gather_output: whether every rank gets all output features, without padding.
        dtype: of the parameters.
        device: of the parameters; None: torch's default device.
        stride: number of equally large fused matrices in the output (2 for gate and up), each of which is
            sharded by itself. In checkpoints they appear as ``weight_0``, ``weight_1``, …
        init_method: in-place function of a full (unfused) weight; None: as ``nn.Linear``.
        sequence_parallel_enabled: the input is this rank's part of the sequence.
        sequence_dimension: where the sequence is (None: 0); used under sequence parallel.
        keep_master_weight: must be False.
        skip_bias_add: returns ``(output, bias)`` with the bias not added.
        pad: whether an ``output_size`` that is not divisible is padded to a multiple of the ranks. Padding
            rows are zero and stay zero. Without ``gather_output`` the padded features are zero (give
            ``parallel_cross_entropy`` its ``vocab_size`` so that it leaves them out).
        tensor_model_parallel_group: None or the tensor-parallel group of the current mesh.
        reduce_dtype: input gradients are summed over ranks in this dtype if it is wider than their own.

    Attributes:
        weight: ``(output_size_per_partition, input_size)``.
        bias: ``(output_size_per_partition,)`` or None.
        output_size_per_partition: local output features, padding included.
        padding: features that were added to ``output_size``.
        valid_size_per_rank: output features of each rank that are not padding.

    Raises:
        ConfigError: sizes that cannot be cut, or an argument that cannot work.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        stride: int = 1,
        init_method: InitMethod | None = None,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = None,
        keep_master_weight: bool = False,
        skip_bias_add: bool = False,
        pad: bool = False,
        tensor_model_parallel_group: dist.ProcessGroup | None = None,
        reduce_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            sequence_parallel_enabled,
            sequence_dimension,
            reduce_dtype,
            tensor_model_parallel_group,
            keep_master_weight,
        )
        if stride < 1 or output_size % stride:
            raise ConfigError(
                f"output_size {output_size} is not divisible by stride {stride}: the stride is the number of "
                "equally large fused matrices; correct one of the two."
            )
        ranks, each = self.tensor_parallel_size, output_size // stride
        per_rank = extent_per_rank(each, ranks, pad=pad, what="output_size" + ("/stride" * (stride > 1)))
        self.input_size, self.output_size, self.stride = input_size, output_size, stride
        self.gather_output, self.skip_bias_add = gather_output, skip_bias_add
        self.output_size_per_partition = per_rank * stride
        self.padding = per_rank * ranks * stride - output_size
        self.valid_size_per_rank = tuple(
            stride * min(per_rank, max(0, each - r * per_rank)) for r in range(ranks)
        )
        self.weight = nn.Parameter(
            torch.empty(self.output_size_per_partition, input_size, dtype=dtype, device=device)
        )
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(self.output_size_per_partition, dtype=dtype, device=device))
        self._padding_runs = self._mark(each, per_rank)
        inits = {"weight": Init(method=init_method)}
        record(self, inits | ({"bias": Init(fan_in=input_size)} if bias else {}))

    def _mark(self, each: int, per_rank: int) -> tuple[tuple[int, int], ...]:
        """Attaches the specs; returns the runs of padding rows."""
        for leaf, rest in (("weight", (self.input_size,)), ("bias", ())):
            param = getattr(self, leaf)
            if param is None:
                continue
            parts = [
                row_part(
                    name=f"{leaf}_{j}" if self.stride > 1 else "",
                    global_shape=(each, *rest),
                    per_rank=per_rank,
                    index=self.tensor_parallel_rank,
                    local_start=j * per_rank,
                )
                for j in range(self.stride)
            ]
            mark_sharded(param, parts, dim=0, stride=self.stride, ranks=self.tensor_parallel_size)
            if leaf == "weight":
                runs = padding_runs(parts, 0, self.output_size_per_partition)
        return runs

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Applies the map. Every rank of the tensor-parallel group calls it together.

        Args:
            input: ``(…, input_size)``, the same on every rank; under sequence parallel this rank's part.

        Returns:
            ``(…, output_size/tp)``, or ``(…, output_size)`` with ``gather_output``, over the whole sequence;
            with ``skip_bias_add`` a pair of that and the local bias (gathered as the output is).
        """
        tp, bias = self.tensor_parallel(), None if self.skip_bias_add else self.bias
        if tp.size == 1:
            output = F.linear(input, self.weight, bias)
            return (output, self.bias) if self.skip_bias_add else output
        output = column_linear(input, self.weight, bias, self.communication(tp, self._padding_runs))
        if self.gather_output:
            output = self._gather(output)
        if not self.skip_bias_add:
            return output
        full_bias = self._gather(self.bias) if self.gather_output and self.bias is not None else self.bias
        return output, full_bias

    def _gather(self, output: Tensor) -> Tensor:
        """All ranks' features in global order, padding cut off."""
        output = collectives.gather_from_tensor_model_parallel_region(output)
        if self.stride == 1:
            return output[..., : self.output_size] if self.padding else output
        ranks = self.tensor_parallel_size
        each = torch.unflatten(output, -1, (ranks, self.stride, -1)).transpose(-3, -2).flatten(-2)
        return each[..., : self.output_size // self.stride].flatten(-2)

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.output_size}, bias={self.bias is not None}, "
            f"tp={self.tensor_parallel_size}, gather_output={self.gather_output}, stride={self.stride}, "
            f"sequence_parallel={self.sequence_parallel_enabled}"
        )


class RowParallelLinear(ParallelLayer):
    """A linear map whose input features are cut over the ranks: W sharded by columns, partial sums added.

    Args:
        input_size: input features of all ranks together, padding not counted.
        output_size: output features.
        bias: whether there is one (whole on every rank, added after the sum).
        input_is_parallel: whether the input is this rank's slice of the features already; else it is cut.
        dtype: of the parameters.
        device: of the parameters; None: torch's default device.
        stride: must be 1.
        init_method: in-place function of the full weight; None: as ``nn.Linear``.
        sequence_parallel_enabled: the output is this rank's part of the sequence (needs
            ``input_is_parallel``). The bias then sees only that part, so that its gradient is partial: it is
            marked ``sequence_parallel_enabled`` and the optimizer sums it.
        sequence_dimension: where the sequence is (None: 0); used under sequence parallel.
        keep_master_weight: must be False.
        skip_bias_add: returns ``(output, bias)`` with the bias not added.
        pad: whether an ``input_size`` that is not divisible is padded. Padding columns are zero and stay zero.
        reduce_output: False returns the partial sums (needs ``bias=False`` or ``skip_bias_add``).
        reduce_dtype: partial sums are added in this dtype if it is wider than their own.
        tensor_model_parallel_group: None or the tensor-parallel group of the current mesh.

    Attributes:
        weight: ``(output_size, input_size_per_partition)``.
        bias: ``(output_size,)`` or None.

    Raises:
        ConfigError: sizes that cannot be cut, or an argument that cannot work.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        stride: int = 1,
        init_method: InitMethod | None = None,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = None,
        keep_master_weight: bool = False,
        skip_bias_add: bool = False,
        pad: bool = False,
        reduce_output: bool = True,
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
        _check_row(stride, sequence_parallel_enabled, input_is_parallel, reduce_output, bias, skip_bias_add)
        per_rank = extent_per_rank(input_size, self.tensor_parallel_size, pad=pad, what="input_size")
        self.input_size, self.output_size = input_size, output_size
        self.input_is_parallel, self.reduce_output = input_is_parallel, reduce_output
        self.skip_bias_add = skip_bias_add
        self.input_size_per_partition = per_rank
        self.padding = per_rank * self.tensor_parallel_size - input_size
        self.weight = nn.Parameter(torch.empty(output_size, per_rank, dtype=dtype, device=device))
        part = column_part(
            global_shape=(output_size, input_size), per_rank=per_rank, index=self.tensor_parallel_rank
        )
        mark_sharded(self.weight, [part], dim=1, stride=1, ranks=self.tensor_parallel_size)
        self._padding_runs = padding_runs([part], 1, per_rank)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(output_size, dtype=dtype, device=device))
            self.bias.sequence_parallel_enabled = sequence_parallel_enabled  # type: ignore[attr-defined]
        inits = {"weight": Init(method=init_method)}
        record(self, inits | ({"bias": Init(fan_in=input_size)} if bias else {}))

    def forward(self, input_: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Applies the map. Every rank of the tensor-parallel group calls it together.

        Args:
            input_: ``(…, input_size/tp)``, or ``(…, input_size)`` without ``input_is_parallel``, over the whole
                sequence.

        Returns:
            ``(…, output_size)``; under sequence parallel this rank's part of the sequence; with
            ``skip_bias_add`` a pair of that and the bias.
        """
        tp = self.tensor_parallel()
        if tp.size == 1:
            output = F.linear(input_, self.weight, None if self.skip_bias_add else self.bias)
            return (output, self.bias) if self.skip_bias_add else output
        if not self.input_is_parallel:
            padded = F.pad(input_, (0, self.padding)) if self.padding else input_
            input_ = collectives.scatter_to_tensor_model_parallel_region(padded)
        how = self.communication(tp, self._padding_runs, self.reduce_output)
        output = row_linear(input_, self.weight, how)
        if self.skip_bias_add:
            return output, self.bias
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.output_size}, bias={self.bias is not None}, "
            f"tp={self.tensor_parallel_size}, input_is_parallel={self.input_is_parallel}, "
            f"sequence_parallel={self.sequence_parallel_enabled}"
        )


def _check_row(
    stride: int, sequence: bool, input_is_parallel: bool, reduce_output: bool, bias: bool, skip_bias_add: bool
) -> None:
    if stride != 1:
        raise ConfigError(
            f"RowParallelLinear has stride 1 only, not {stride}: its input features are not a fused set; "
            "unfuse them, or use ColumnParallelLinear for the fused side."
        )
    if sequence and not input_is_parallel:
        raise ConfigError(
            "sequence_parallel_enabled needs input_is_parallel=True: the input is sharded by features, the "
            "output along the sequence; pass the output of a ColumnParallelLinear(gather_output=False)."
        )
    if not reduce_output and bias and not skip_bias_add:
        raise ConfigError(
            "reduce_output=False leaves partial sums, to which every rank would add the bias: "
            "use bias=False or skip_bias_add=True."
        )
