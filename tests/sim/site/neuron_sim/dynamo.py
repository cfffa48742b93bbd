"""The compiler `neuron` of ``torch.compile``: runs what it is given, and is as strict as the real one says it is.

Static shapes only: symbolic sizes are refused, another shape is another graph, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._guards import CompileContext


@dataclass(frozen=True)
class Graph:
    """One compiled graph.

    Attributes:
        frame: number of the function, or part of one, that it was compiled from.
        attempt: 0 for the first graph of the frame; more are recompiles.
        shapes: of its tensor inputs.
    """

    frame: int
    attempt: int
    shapes: tuple[tuple[int, ...], ...]


graphs: list[Graph] = []
"""All that this process compiled, in order."""


def recompiles() -> list[Graph]:
    """Those of frames that had been compiled before."""
    return [graph for graph in graphs if graph.attempt > 0]


def neuron(module: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """Compiles a graph; called by dynamo.

    Raises:
        RuntimeError: sizes are symbolic.
        TypeError: unknown options.
    """
    if options:
        raise TypeError(f"the neuron compiler knows no options {sorted(options)}")
    for value in inputs:
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        if any(isinstance(size, torch.SymInt | torch.SymFloat) for size in sizes):
            raise RuntimeError(
                f"the neuron compiler needs static shapes, and was given {tuple(sizes)}: use dynamic=False, and pad "
                f"inputs to few shapes."
            )
    compile_id = CompileContext.current_compile_id()
    graphs.append(
        Graph(
            frame=-1 if compile_id is None or compile_id.frame_id is None else compile_id.frame_id,
            attempt=0
            if compile_id is None or compile_id.frame_compile_id is None
            else compile_id.frame_compile_id,
            shapes=tuple(tuple(value.shape) for value in inputs if isinstance(value, torch.Tensor)),
        )
    )
    return aot_eager(module, inputs)
