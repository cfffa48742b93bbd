"""From the user's module to this rank's share of it: plan, draw, move, synchronise, report."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from neuron_lightning.backends import get_backend
from neuron_lightning.errors import ConfigError
from neuron_lightning.lightning.launch import global_seed
from neuron_lightning.lightning.settings import StrategySettings
from neuron_lightning.lightning.strategy_collectives import gather_objects, is_distributed
from neuron_lightning.parallel import mesh
from neuron_lightning.parallel.initialize import materialize
from neuron_lightning.parallel.move import move_module
from neuron_lightning.parallel.plan import APPLIED, parallelize
from neuron_lightning.parallel.random import model_parallel_manual_seed
from neuron_lightning.parallel.spec import ShardSpec, get_spec

_log = logging.getLogger(__name__)

_ALIKE = "_neuron_lightning_drawn_alike"


def model_seed() -> int:
    """The seed that weights are drawn from: ``seed_everything``'s, else rank 0's. All ranks together."""
    seed = global_seed()
    return seed if seed is not None else gather_objects(torch.initial_seed())[0]


def mark_drawn_alike(module: nn.Module, names: Iterable[str]) -> None:
    """Notes that these parameters hold what every other rank has drawn, so that nothing need be sent."""
    parameters = dict(module.named_parameters())
    for name in names:
        setattr(parameters[name], _ALIKE, True)


def prepare_module(module: nn.Module, settings: StrategySettings, device: torch.device) -> None:
    """Makes ``module`` this rank's share, on its device, with the weights all ranks agree on. All ranks together.

    Raises:
        ConfigError: the ranks built different models, or a weight that nothing can draw.
    """
    seed = model_seed()
    _check_equal_models(module)
    _apply_plan(module, settings)
    mark_drawn_alike(module, materialize(module, seed, device))
    move_module(module, device)
    _synchronise(module, everything=settings.sync_module_states)
    if mesh.current().world_size > 1:
        model_parallel_manual_seed(seed)


def _apply_plan(module: nn.Module, settings: StrategySettings) -> None:
    if settings.tp_plan is None:
        return
    applied = [name or "the module" for name, part in module.named_modules() if hasattr(part, APPLIED)]
    if applied:
        rank_zero_info(f"tp_plan of the strategy is not used: {applied[0]} was parallelised before.")
        return
    # Slices must come from one and the same weight.
    _broadcast([p for p in module.parameters() if not p.is_meta], None, 0)
    parallelize(module, settings.tp_plan, sequence_parallel=settings.sequence_parallel)


def _check_equal_models(module: nn.Module) -> None:
    mine = [(name, tuple(p.shape), str(p.dtype)) for name, p in module.named_parameters()]
    layout = mesh.current()
    everyone = gather_objects((layout.coordinates["tp"], mine))
    for rank, (tp, theirs) in enumerate(everyone):
        first_tp, first = next((r, e) for r, e in enumerate(everyone) if e[0] == tp)
        if theirs == first[1]:
            continue
        differing = next((pair for pair in zip(first[1], theirs, strict=False) if pair[0] != pair[1]), None)
        detail = (
            f"{differing[0]} against {differing[1]}"
            if differing
            else f"{len(first[1])} against {len(theirs)}"
        )
        raise ConfigError(
            f"data-parallel ranks must build the same model, but ranks {first_tp} and {rank} differ: parameters "
            f"{detail}. Build it from the same configuration on every rank."
        )


def _synchronise(module: nn.Module, everything: bool) -> None:
    """Sends what is not drawn alike: copies of one weight from global rank 0, shards within their replicas."""
    layout = mesh.current()
    if layout.world_size == 1:
        return
    unsure = [p for p in module.parameters() if everything or not getattr(p, _ALIKE, False)]
    shards = [p for p in unsure if isinstance(getattr(p, "shard_spec", None), ShardSpec)]
    ids = {id(p) for p in shards}
    _broadcast([p for p in unsure if id(p) not in ids], None, 0)
    _broadcast([*shards, *module.buffers()], layout.group("dp"), layout.group_ranks("dp")[0])


def _broadcast(tensors: Iterable[Tensor], group: dist.ProcessGroup | None, source: int) -> None:
    if not is_distributed():
        return
    with torch.no_grad():
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            get_backend().broadcast(whole, source, group)
            if not tensor.is_contiguous():
                tensor.copy_(whole)


def count_parameters(parameters: Iterable[Tensor], tp: int) -> tuple[int, int]:
    """Elements of the whole model (padding and copies not counted), and of this rank's share."""
    total = here = 0
    for param in parameters:
        here += param.numel()
        total += sum(math.prod(part.global_shape) for part in get_spec(param, tp).parts)
    return total, here


def report_layout(
    module: nn.Module, settings: StrategySettings, precision: str, device: torch.device
) -> None:
    """Says on rank 0 what runs where."""
    layout = mesh.current()
    total, here = count_parameters(module.parameters(), settings.tp)
    features: Mapping[str, bool] = {"ZeRO-1": settings.zero1, "sequence parallel": settings.sequence_parallel}
    extra = "".join(f", {name}" for name, on in features.items() if on)
    rank_zero_info(
        f"Layout: {mesh.describe(layout)} ({layout.world_size} rank(s), {device.type}){extra}, {precision}\n"
        f"Parameters: {total:,} in all, {here:,} per rank"
    )
