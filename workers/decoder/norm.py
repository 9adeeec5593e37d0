"""Normalisation of hidden states. T tokens, C model width."""

from __future__ import annotations

from torch import Tensor

from workers.decoder import ops
from workers.decoder.config import NormConfig
from workers.decoder.tensors import Tensors


class Norm:
    """RMSNorm or LayerNorm, as its configuration says. Weights are float32 whatever the model's dtype."""

    def __init__(self, config: NormConfig, weight: Tensor, bias: Tensor | None) -> None:
        self.config = config
        self.weight = weight
        self.bias = bias

    @classmethod
    def load(cls, config: NormConfig, width: int, tensors: Tensors) -> Norm:
        bias = tensors.vector("bias", width) if config.bias else None
        return cls(config, tensors.vector("weight", width), bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        if self.config.kind == "rms":
            return ops.rms_norm(x, self.weight, self.config.eps)
        return ops.layer_norm(x, self.weight, self.bias, self.config.eps)
