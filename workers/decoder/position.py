"""Rotary positions (Su et al. 2021) and how they are stretched; tables of position vectors. T tokens, C model width."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.decoder.config import PositionTableConfig, RopeScaling, RotaryConfig
from workers.decoder.tensors import Tensors
from workers.decoder.weight import DenseWeight, Weight


class Rotary:
    """Turns positions into the angles by which query and key heads are rotated."""

    def __init__(self, config: RotaryConfig, device: torch.device, *, context: int) -> None:
        """`context`: positions that are ever asked for."""
        exponents = torch.arange(0, config.width, 2, dtype=torch.float32) / config.width
        frequencies = 1.0 / config.theta**exponents  # [width / 2], radians a position
        if config.scaling is not None:
            frequencies = _scaled(frequencies, config, context)
        self._frequencies = frequencies.to(device)
        self._factor = 1.0 if config.scaling is None else config.scaling.attention_factor

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T] int64 -> cosine and sine, each [T, width / 2] float32."""
        angles = positions.float()[:, None] * self._frequencies
        cosine, sine = angles.cos(), angles.sin()
        return (cosine, sine) if self._factor == 1.0 else (cosine * self._factor, sine * self._factor)


class PositionTable:
    """A vector for each position, learned or sinusoidal."""

    def __init__(self, config: PositionTableConfig, table: Weight) -> None:
        self.config = config
        self.table = table  # [rows, C]

    @classmethod
    def load(cls, config: PositionTableConfig, hidden_width: int, tensors: Tensors) -> PositionTable:
        if config.kind == "learned":
            return cls(config, tensors.unquantized().weight(hidden_width, ("weight", config.rows)))
        return cls(config, DenseWeight(sinusoids(config.rows, hidden_width).to(tensors.device)))

    def __call__(self, positions: Tensor) -> Tensor:
        """positions [T] int64 -> [T, C]."""
        return self.table.rows(positions + self.config.offset)


def sinusoids(rows: int, width: int) -> Tensor:
    """[rows, width] float32: sines in the first half, cosines in the second, a zero behind them if the width is odd."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half).float() * -(math.log(10_000) / max(1, half - 1)))
    angles = torch.arange(rows).float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos(), torch.zeros(rows, width - 2 * half)], dim=1)


def _scaled(frequencies: Tensor, config: RotaryConfig, context: int) -> Tensor:
    scaling = config.scaling
    assert scaling is not None
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind in ("divisors", "longrope"):
        short = scaling.kind == "longrope" and context <= scaling.original_context
        return frequencies / torch.tensor(scaling.short_divisors if short else scaling.divisors)
    if scaling.kind == "yarn":
        kept = _kept_by_yarn(config, scaling)
        return kept * frequencies + (1 - kept) * frequencies / scaling.factor
    # Llama 3: by how often a wave turns within the original context. From `high` turns on it is kept, up to `low`
    # turns it is stretched in full, between the two in proportion.
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_context * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _kept_by_yarn(config: RotaryConfig, scaling: RopeScaling) -> Tensor:
    """How much of each of the width / 2 frequencies stays: 1 before the ramp, 0 behind it."""

    def column(turns: float) -> float:
        """The column whose wave turns so often within the original context."""
        return config.width * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = column(scaling.beta_fast), column(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.width - 1)
    ramp = (torch.arange(config.width // 2) - low) / ((high - low) or 0.001)
    return 1 - ramp.clamp(0, 1)
