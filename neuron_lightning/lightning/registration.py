"""Makes ``Trainer(strategy="neuron", accelerator="neuron")`` known to Lightning."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import Strategy, StrategyRegistry

from neuron_lightning.lightning import accelerator

NAME = "neuron"


def register() -> None:
    """Registers strategy and accelerator under ``"neuron"``, once."""
    accelerator.register()
    if NAME not in StrategyRegistry:
        StrategyRegistry.register(
            NAME, _strategy, description="Tensor parallel, data parallel and ZeRO-1 ranks"
        )


def _strategy(**arguments: Any) -> Strategy:
    from neuron_lightning.lightning.strategy import NeuronXLAStrategy

    return NeuronXLAStrategy(**arguments)
