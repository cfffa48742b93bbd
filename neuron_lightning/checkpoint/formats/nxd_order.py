"""Which parameter is which number in an NxD optimizer's state: its files hold numbers and shapes, no names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from neuron_lightning.errors import CheckpointError

NO_DECAY = (("bias", "LayerNorm"), ("bias", "norm", "LayerNorm"))
"""Words that exempt a parameter from weight decay: the guide's, and the usual ones."""
BUFFERS = (r".*inv_freq", r".*num_batches_tracked", r".*running_(mean|var)")

Shape = tuple[int, ...]


def parameters_in(names: Mapping[str, Shape], buffers: Sequence[str] = BUFFERS) -> dict[str, Shape]:
    """The names of a state dict that are parameters."""
    return {n: s for n, s in names.items() if not any(re.fullmatch(pattern, n) for pattern in buffers)}


def names_by_group(
    parameters: Mapping[str, Shape],
    groups: Sequence[Sequence[int]],
    shapes: Mapping[int, Shape],
    no_decay: Sequence[str] | None = None,
) -> list[list[str]]:
    """The names in each parameter group, in order.

    One group has the order of the model; of two, the second holds the parameters without weight decay. An order
    counts if the sizes of the groups and every known shape agree.

    Args:
        parameters: names in the order of the model, with local shapes.
        groups: by group, the numbers in it.
        shapes: local shapes by number, as far as they are known.
        no_decay: words in names that exempt from weight decay; None: try the usual ones.

    Raises:
        CheckpointError: no order agrees, or several that differ do.
    """
    fitting: list[list[list[str]]] = []
    for order in _orders(parameters, len(groups), no_decay):
        if order not in fitting and _agrees(order, parameters, groups, shapes):
            fitting.append(order)
    if len(fitting) == 1:
        return fitting[0]
    sizes = [len(group) for group in groups]
    if not fitting:
        raise CheckpointError(
            f"the optimizer state has groups of {sizes} parameters, the model {len(parameters)}; no usual grouping gives "
            "these sizes and shapes, and NxD's files hold no names: pass the words in the names that exempt from weight "
            "decay (--no-decay bias norm), or convert the weights only (--weights-only)."
        )
    raise CheckpointError(
        f"several groupings of the parameters give groups of {sizes} with the same shapes: pass the words in the names "
        "that exempt from weight decay (--no-decay bias norm)."
    )


def _orders(
    parameters: Mapping[str, Shape], number: int, no_decay: Sequence[str] | None
) -> list[list[list[str]]]:
    if number == 1:
        return [[list(parameters)]]
    if number != 2:
        return []
    orders = []
    for words in NO_DECAY if no_decay is None else (tuple(no_decay),):
        for exempt_1d in (False, True):
            exempt = {
                n for n, s in parameters.items() if any(w in n for w in words) or (exempt_1d and len(s) < 2)
            }
            orders.append(
                [[n for n in parameters if n not in exempt], [n for n in parameters if n in exempt]]
            )
    return orders


def _agrees(
    order: Sequence[Sequence[str]],
    parameters: Mapping[str, Shape],
    groups: Sequence[Sequence[int]],
    shapes: Mapping[int, Shape],
) -> bool:
    if [len(group) for group in order] != [len(group) for group in groups]:
        return False
    pairs = [
        pair
        for names, numbers in zip(order, groups, strict=True)
        for pair in zip(names, numbers, strict=True)
    ]
    return all(shapes.get(number, parameters[name]) == parameters[name] for name, number in pairs)
