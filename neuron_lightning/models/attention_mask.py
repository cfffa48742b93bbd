"""Padding masks, and how to know for free that nothing is padded.

Scripts pass ``attention_mask=ones`` with every batch. Looking whether a device tensor is all ones makes the
host wait; not looking means a masked attention where the causal one would do. So whoever has the batch on the
host looks there and marks the tensor; an unmarked mask is always honoured.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ATTRIBUTE = "neuron_lightning_unpadded"


def mark_unpadded(mask: Tensor) -> Tensor:
    """Marks ``mask`` as all ones, so that causal attention alone is right; returns it.

    The mark is on this tensor object alone: a copy, a slice or a moved tensor does not inherit it.
    """
    setattr(mask, _ATTRIBUTE, True)
    return mask


def is_unpadded(mask: Tensor) -> bool:
    """Whether ``mask`` was marked by :func:`mark_unpadded`; never looks at its values."""
    return bool(getattr(mask, _ATTRIBUTE, False))


def attention_mask_of(mask_BS: Tensor) -> Tensor:
    """Which key each query may attend to: its own, and the earlier ones that are not padding.

    Args:
        mask_BS: (batch, sequence), 0 for padding on either side.

    Returns:
        (batch, 1, sequence, sequence) bool. Padding attends to itself, so that no row is empty.
    """
    length = mask_BS.shape[1]
    causal_SS = torch.ones(length, length, dtype=torch.bool, device=mask_BS.device).tril()
    itself_SS = torch.eye(length, dtype=torch.bool, device=mask_BS.device)
    return (causal_SS & mask_BS.bool()[:, None, None, :]) | itself_SS
