"""The dense feed-forward network. T tokens, C model width, F feed-forward width."""

from __future__ import annotations

from torch import Tensor

from workers.decoder import ops
from workers.decoder.config import ClampedSwiGLU, FeedForwardConfig
from workers.decoder.tensors import Tensors
from workers.decoder.weight import Weight


class FeedForward:
    """Gated (SwiGLU, GeGLU: Shazeer 2020) or plain. When gated, gate and up come from one product."""

    def __init__(
        self, config: FeedForwardConfig, up: Weight, up_bias: Tensor | None, down: Weight, down_bias: Tensor | None
    ) -> None:
        self.config = config
        self.up = up  # [2F, C] when gated, gate first; else [F, C]
        self.up_bias = up_bias
        self.down = down  # [C, F]
        self.down_bias = down_bias

    @classmethod
    def load(cls, config: FeedForwardConfig, hidden_width: int, tensors: Tensors) -> FeedForward:
        into = ("gate", "up") if config.gated else ("up",)
        return cls(
            config,
            tensors.weight(hidden_width, *((f"{name}.weight", config.width) for name in into)),
            tensors.vectors(*((f"{name}.bias", config.width) for name in into)) if config.bias else None,
            tensors.weight(config.width, ("down.weight", hidden_width)),
            tensors.vector("down.bias", hidden_width) if config.bias else None,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, C] -> [T, C]."""
        return ops.linear(inner_values(ops.linear(x, self.up, self.up_bias), self.config), self.down, self.down_bias)


def inner_values(up: Tensor, config: FeedForwardConfig) -> Tensor:
    """What lies between the two products: up [T, 2F] when gated, gate first, else [T, F] -> [T, F]."""
    if isinstance(config.activation, ClampedSwiGLU):
        return ops.clamped_swiglu(up, config.activation.alpha, config.activation.limit)
    return ops.act_mul(up, config.activation) if config.gated else ops.act(up, config.activation)
