"""How hidden states leave the decoder as logits. N rows, C model width, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.decoder import ops
from workers.decoder.config import DecoderConfig
from workers.decoder.tensors import Tensors
from workers.decoder.weight import Weight


class Head:
    """A product with the output matrix, or the embedding itself when tied; then scale and soft-cap."""

    def __init__(
        self, weight: Weight, bias: Tensor | None = None, *, scale: float = 1.0, softcap: float | None = None
    ) -> None:
        self.weight = weight  # [V, C]
        self.bias = bias  # [V]
        self.scale = scale
        self.softcap = softcap

    @classmethod
    def load(cls, config: DecoderConfig, embedding: Weight, tensors: Tensors) -> Head:
        output = embedding
        if not config.tied_embeddings:
            output = tensors.weight(config.hidden_width, ("output.weight", config.vocab_size))
        return cls(
            output,
            tensors.vector("output.bias", config.vocab_size) if config.output_bias else None,
            scale=config.logit_scale,
            softcap=config.logit_softcap,
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [N, C] after the final norm -> [N, V] float32."""
        logits = ops.linear(hidden, self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
