"""Parameter groups for weight decay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

NO_DECAY = ("bias", "norm", "LayerNorm")


def get_param_groups_by_weight_decay(
    named_parameters: nn.Module | Iterable[tuple[str, nn.Parameter]],
    weight_decay: float = 0.01,
    no_decay: Sequence[str] = NO_DECAY,
    exempt_1d: bool = True,
) -> list[dict[str, Any]]:
    """Two parameter groups: with weight decay, and without.

    Args:
        named_parameters: a module, or (name, parameter) pairs. Frozen parameters are left out, tied ones
            taken once.
        weight_decay: decay of the first group.
        no_decay: a parameter whose name contains one of these is exempt.
        exempt_1d: exempt parameters of fewer than two dimensions whatever their name.

    Returns:
        ``[{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}]``; both are
        there even if empty, so that the groups of a resumed run match.
    """
    pairs = (
        named_parameters.named_parameters() if isinstance(named_parameters, nn.Module) else named_parameters
    )
    unique = {id(param): (name, param) for name, param in reversed(list(pairs)) if param.requires_grad}
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, param in reversed(unique.values()):
        is_exempt = any(word in name for word in no_decay) or (exempt_1d and param.dim() < 2)
        (exempt if is_exempt else decayed).append(param)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
