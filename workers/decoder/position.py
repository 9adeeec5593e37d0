"""Rotary positions (Su et al. 2021) and how they are stretched. T tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.decoder.config import RopeScaling, RotaryConfig


class Rotary:
    """Turns positions into the angles by which query and key heads are rotated."""

    def __init__(self, config: RotaryConfig, device: torch.device) -> None:
        exponents = torch.arange(0, config.width, 2, dtype=torch.float32) / config.width
        frequencies = 1.0 / config.theta**exponents  # [width / 2], radians a position
        if config.scaling is not None:
            frequencies = _scaled(frequencies, config.scaling)
        self._frequencies = frequencies.to(device)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T] int64 -> cosine and sine, each [T, width / 2] float32."""
        angles = positions.float()[:, None] * self._frequencies
        return angles.cos(), angles.sin()


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "divisors":
        return frequencies / torch.tensor(scaling.divisors)
    # Llama 3: by how often a wave turns within the original context. From `high` turns on it is kept, up to `low`
    # turns it is stretched in full, between the two in proportion.
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_context * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor
