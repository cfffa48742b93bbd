"""The tensor-parallel embedding."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_lightning.errors import ConfigError
from neuron_lightning.parallel import collectives
from neuron_lightning.parallel.initialize import Init, InitMethod, record
from neuron_lightning.parallel.layer_base import ParallelLayer
from neuron_lightning.parallel.shards import column_part, extent_per_rank, mark_sharded, row_part


class ParallelEmbedding(ParallelLayer):
    """An embedding whose vocabulary (or, on request, embedding dimension) is cut over the ranks.

    Args:
        num_embeddings: vocabulary size, padding not counted.
        embedding_dim: size of a vector.
        padding_idx: token whose vector is zero and gets no gradient, as in ``nn.Embedding``.
        max_norm: must be None.
        norm_type: must be 2.0.
        scale_grad_by_freq: must be False.
        sparse: must be False.
        init_method: in-place function of the full table.
        device: of the table; None: torch's default device.
        dtype: of the table.
        shard_across_embedding: cuts the embedding dimension instead of the vocabulary.
        pad: whether a size that is not divisible is padded.
        tensor_model_parallel_group: None or the tensor-parallel group of the current mesh.
        sequence_parallel_enabled: the output is this rank's part of the sequence.
        sequence_dimension: where the sequence is in the output (None: 0), under sequence parallel.

    Attributes:
        weight: ``(num_embeddings/tp, embedding_dim)``, or ``(num_embeddings, embedding_dim/tp)``.

    Raises:
        ConfigError: sizes that cannot be cut, or an argument that cannot work on a sharded table.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        init_method: InitMethod = nn.init.normal_,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        shard_across_embedding: bool = False,
        pad: bool = False,
        tensor_model_parallel_group: dist.ProcessGroup | None = None,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = None,
    ) -> None:
        super().__init__(
            sequence_parallel_enabled, sequence_dimension, torch.float32, tensor_model_parallel_group
        )
        if max_norm is not None or norm_type != 2.0 or scale_grad_by_freq or sparse:
            raise ConfigError(
                "ParallelEmbedding has no max_norm, norm_type, scale_grad_by_freq or sparse: each rank sees only "
                "its own rows of the table; leave them out, or use nn.Embedding."
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = _row_index(padding_idx, num_embeddings)
        self.shard_across_embedding = shard_across_embedding
        ranks, rank = self.tensor_parallel_size, self.tensor_parallel_rank
        what = "embedding_dim" if shard_across_embedding else "num_embeddings"
        size = embedding_dim if shard_across_embedding else num_embeddings
        per_rank = extent_per_rank(size, ranks, pad=pad, what=what)
        self.padding = per_rank * ranks - size
        self._start, self._rows = rank * per_rank, per_rank
        local, shape = (per_rank, embedding_dim), (num_embeddings, embedding_dim)
        part = row_part(name="", global_shape=shape, per_rank=per_rank, index=rank)
        if shard_across_embedding:
            local = (num_embeddings, per_rank)
            part = column_part(global_shape=shape, per_rank=per_rank, index=rank)
        self.weight = nn.Parameter(torch.empty(local, dtype=dtype, device=device))
        mark_sharded(self.weight, [part], dim=int(shard_across_embedding), stride=1, ranks=ranks)
        zero_rows = () if self.padding_idx is None else (self.padding_idx,)
        record(self, {"weight": Init(method=init_method, zero_rows=zero_rows)})

    def forward(self, input: Tensor) -> Tensor:
        """Looks token ids up. Every rank of the tensor-parallel group calls it together.

        Args:
            input: ``(batch, seq)`` integers, the same on every rank, below ``num_embeddings`` (not checked
                on the device).

        Returns:
            ``(batch, seq, embedding_dim)``. With ``sequence_parallel_enabled``, at any number of ranks, it is
            sequence first and cut: ``(seq/tp, batch, embedding_dim)``; with ``sequence_dimension=1``
            ``(batch, seq/tp, embedding_dim)``.
        """
        tp = self.tensor_parallel()
        if tp.size == 1:
            return self._ordered(F.embedding(input, self.weight, self.padding_idx))
        if self.shard_across_embedding:
            local = F.embedding(input, self.weight, self.padding_idx)
            full = collectives.gather_from_tensor_model_parallel_region(local)[..., : self.embedding_dim]
            if not self.sequence_parallel_enabled:
                return full
            return collectives.scatter_to_sequence_parallel_region(
                self._ordered(full), self.sequence_dimension
            )
        partial = self._ordered(self._lookup(input))
        if self.sequence_parallel_enabled:
            return collectives.reduce_scatter_to_sequence_parallel_region(partial, self.sequence_dimension)
        return collectives.reduce_from_tensor_model_parallel_region(partial)

    def _lookup(self, ids: Tensor) -> Tensor:
        """Vectors of the tokens that this rank holds, zero for the others."""
        local = ids - self.tensor_parallel().start(self._rows)
        elsewhere = (local < 0) | (local >= self._rows)
        mine = None if self.padding_idx is None else self.padding_idx - self._start
        if mine is not None and not 0 <= mine < self._rows:
            mine = None
        vectors = F.embedding(local.masked_fill(elsewhere, 0), self.weight, mine)
        return vectors.masked_fill(elsewhere.unsqueeze(-1), 0.0)

    def _ordered(self, vectors: Tensor) -> Tensor:
        """Sequence first where sequence parallel wants it so."""
        if self.sequence_parallel_enabled and self.sequence_dimension == 0:
            return vectors.transpose(0, 1).contiguous()
        return vectors

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}, "
            f"tp={self.tensor_parallel_size}, sequence_parallel={self.sequence_parallel_enabled}"
        )


def _row_index(padding_idx: int | None, num_embeddings: int) -> int | None:
    if padding_idx is None:
        return None
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ConfigError(
            f"padding_idx {padding_idx} is outside the vocabulary of {num_embeddings}: choose one from "
            f"{-num_embeddings} to {num_embeddings - 1}."
        )
    return padding_idx % num_embeddings
