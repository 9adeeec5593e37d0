"""How token ids enter the decoder. T tokens, C model width, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.decoder.config import DecoderConfig
from workers.decoder.norm import Norm
from workers.decoder.position import PositionTable
from workers.decoder.tensors import Tensors
from workers.decoder.weight import Weight


class Embedding:
    """A row for each token, scaled, with its position's vector added and normed, as far as the model does so."""

    def __init__(
        self, tokens: Weight, *, scale: float = 1.0, positions: PositionTable | None = None, norm: Norm | None = None
    ) -> None:
        self.tokens = tokens  # [V, C]
        self.positions = positions
        self.norm = norm
        self.scale = scale

    @classmethod
    def load(cls, config: DecoderConfig, tensors: Tensors) -> Embedding:
        width = config.hidden_width
        positions, norm = config.positions, config.embedding_norm
        return cls(
            tensors.weight(width, ("embedding.weight", config.vocab_size)),
            # Gemma was trained with a scale in the weights' own format: 33.94 is 34 in bfloat16.
            scale=float(torch.tensor(config.embedding_scale, dtype=tensors.unquantized().dtype)),
            positions=None if positions is None else PositionTable.load(positions, width, tensors.under("positions")),
            norm=None if norm is None else Norm.load(norm, width, tensors.under("embedding_norm")),
        )

    def __call__(self, token_ids: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """token_ids and positions [T] int64 -> [T, C] in `dtype`."""
        x = self.tokens.rows(token_ids).to(dtype)
        if self.scale != 1.0:
            x = x * self.scale
        if self.positions is not None:
            x = x + self.positions(positions).to(dtype)
        return x if self.norm is None else self.norm(x)
