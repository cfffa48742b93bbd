"""Tensor parallelism: the mesh, layers, loss, initialisation, randomness and gradients on sharded parameters.

Names and signatures are those of ``neuronx_distributed.parallel_layers``, so that a model file moves over by
its import lines.
"""

from __future__ import annotations

from neuron_lightning.parallel import parallel_state
from neuron_lightning.parallel.activation_checkpoint import apply_activation_checkpointing
from neuron_lightning.parallel.collectives import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from neuron_lightning.parallel.grads import allreduce_partial_grads, clip_grad_norm
from neuron_lightning.parallel.initialize import deferred_init, mark_drawn, materialize
from neuron_lightning.parallel.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from neuron_lightning.parallel.loss import parallel_cross_entropy
from neuron_lightning.parallel.plan import parallelize
from neuron_lightning.parallel.qkv import GQAQKVColumnParallelLinear
from neuron_lightning.parallel.random import get_rng_tracker, model_parallel_manual_seed

__all__ = [
    "ColumnParallelLinear",
    "GQAQKVColumnParallelLinear",
    "ParallelEmbedding",
    "RowParallelLinear",
    "allreduce_partial_grads",
    "apply_activation_checkpointing",
    "clip_grad_norm",
    "copy_to_tensor_model_parallel_region",
    "deferred_init",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "get_rng_tracker",
    "mark_drawn",
    "materialize",
    "model_parallel_manual_seed",
    "parallel_cross_entropy",
    "parallel_state",
    "parallelize",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "scatter_to_sequence_parallel_region",
    "scatter_to_tensor_model_parallel_region",
]
