"""Rotary position embeddings (Su et al. 2021) with the scalings that Llamas use.

Shapes: B batch, S sequence, N heads, H head width, F = H / 2 frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuron_lightning.models.llama_config import LlamaConfig


def rope_frequencies(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Angle per position of every pair of a head, on the host.

    Returns:
        (head_dim / 2,) in ``dtype``; in float32 bit for bit what ``transformers`` computes.
    """
    exponents_F = torch.arange(0, config.head_size, 2, dtype=dtype, device="cpu") / config.head_size
    frequency_F = 1.0 / torch.pow(config.rope_theta, exponents_F)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency_F
    if scaling["rope_type"] == "linear":
        return frequency_F.div(float(scaling["factor"]))
    return _llama3(
        frequency_F,
        factor=scaling["factor"],
        low=scaling["low_freq_factor"],
        high=scaling["high_freq_factor"],
        context=scaling["original_max_position_embeddings"],
    )


def _llama3(frequency_F: Tensor, *, factor: float, low: float, high: float, context: int) -> Tensor:
    """Llama 3.1's rule: long waves are stretched by ``factor``, short ones kept, those between blended."""
    wavelength_F = 2 * math.pi / frequency_F
    stretched_F = torch.where(wavelength_F > context / low, frequency_F / factor, frequency_F)
    smooth_F = (context / wavelength_F - low) / (high - low)
    blended_F = (1 - smooth_F) * stretched_F / factor + smooth_F * stretched_F
    between_F = ~(wavelength_F < context / high) & ~(wavelength_F > context / low)
    return torch.where(between_F, blended_F, stretched_F)


class RotaryTable:
    """Cosines and sines for the positions at hand.

    The frequencies are computed on the host once, in float32 (float64 for float64 models), and kept per
    device: a device's own power function may be too coarse for angles of thousands of radians.
    """

    def __init__(self, config: LlamaConfig) -> None:
        self._config = config
        self._frequencies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(
        self, length: int, position_ids: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Tables for positions 0 … length - 1, or for ``position_ids``: (S,) or (B, S).

        Returns:
            cos, sin: (1 or B, 1, S, head_dim / 2) in ``dtype``, ready to broadcast over heads.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        frequency_F = self._frequencies.get((device, wide))
        if frequency_F is None:
            frequency_F = rope_frequencies(self._config, wide).to(device)
            self._frequencies[device, wide] = frequency_F
        position_BS = torch.arange(length, device=device) if position_ids is None else position_ids
        if position_BS.dim() == 1:
            position_BS = position_BS.unsqueeze(0)
        angle_B1SF = (position_BS.to(wide).unsqueeze(-1) * frequency_F).unsqueeze(1)
        return angle_B1SF.cos().to(dtype), angle_B1SF.sin().to(dtype)


def rotate(x_BNSH: Tensor, cos_B1SF: Tensor, sin_B1SF: Tensor) -> Tensor:
    """Turns the pairs (i, i + H/2) of every head by the angles of its position."""
    first, second = x_BNSH.chunk(2, dim=-1)
    return torch.cat((first * cos_B1SF - second * sin_B1SF, second * cos_B1SF + first * sin_B1SF), dim=-1)
