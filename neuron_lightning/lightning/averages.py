"""Averaged weights (EMA, SWA) of Lightning's callbacks: sharded like the module, stored beside it, resharded like it.

``WeightAveraging`` and ``EMAWeightAveraging`` put the averaged weights in the place of the module's, so that a
checkpoint is what one would export, and the module's own beside them. ``StochasticWeightAveraging`` does it the other
way round. Both think of one process that holds everything; here each rank has its shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from neuron_lightning.checkpoint import load_average_state
from neuron_lightning.lightning import internals_loops

CURRENT = "current_model_state"
"""Lightning's name, and ours, of the weights that are trained, where a checkpoint's own are averaged."""
_SWA = "average_model_state"


def average_prepared_module(trainer: Trainer, module: LightningModule) -> None:
    """Gives the averaging callbacks a copy of the module as it is now: sharded, drawn and on its device."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            internals_loops.renew_average(callback, module)


def take(checkpoint: dict[str, Any], module: LightningModule) -> dict[str, Mapping[str, Tensor]]:
    """Takes the further sets of weights out of a checkpoint that is to be saved.

    Args:
        checkpoint: Lightning's; its state dicts of callbacks are replaced, not changed.
        module: whose names they have.
    """
    found: dict[str, Mapping[str, Tensor]] = {}
    if CURRENT in checkpoint:
        names = module.state_dict().keys()
        found[CURRENT] = _named(checkpoint.pop(CURRENT), names)
        checkpoint[CURRENT] = CURRENT  # says that there is such a set
    callbacks = dict(checkpoint.get("callbacks", {}))
    for number, (name, state) in enumerate(callbacks.items()):
        if isinstance(state, Mapping) and isinstance(state.get(_SWA), Mapping):
            key = f"swa_{number}"
            found[key] = state[_SWA]
            callbacks[name] = {**state, _SWA: key}
    if callbacks:
        checkpoint["callbacks"] = callbacks
    return found


def put_back(path: str, checkpoint: dict[str, Any], module: LightningModule, *, verify: bool) -> None:
    """Puts them back as this rank's shards, where the callbacks look for them. All ranks together.

    Args:
        path: the folder.
        checkpoint: what was loaded from it; changed in place.
        module: has the checkpoint's weights already.
        verify: whether hashes are checked first.
    """
    parameters = dict(module.named_parameters())

    def load(key: str) -> dict[str, Tensor]:
        targets = {name: torch.empty_like(t) for name, t in module.state_dict().items()}
        load_average_state(path, key, targets, parameters, verify=verify)
        return targets

    if checkpoint.get(CURRENT) == CURRENT:
        checkpoint["state_dict"] = {name: t.detach().clone() for name, t in module.state_dict().items()}
        checkpoint[CURRENT] = load(CURRENT)
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, dict) and isinstance(state.get(_SWA), str):
            state[_SWA] = load(state[_SWA])


def _named(state: Mapping[str, Tensor], names: Any) -> dict[str, Tensor]:
    return {name: state[name] for name in names}
