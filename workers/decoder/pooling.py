"""One vector from the hidden states of a whole sequence, which arrive in chunks. C model width, t tokens of a chunk."""

from __future__ import annotations

import torch
from torch import Tensor


class Pool:
    """`mean` of all positions; `last`: the last one's; `weighted_mean`: position i weighs i + 1 (Muennighoff 2022).

    Sums are kept in float64, so that it makes no difference to the float32 vector where chunks end.
    """

    def __init__(self, pooling: str) -> None:
        self.pooling = pooling
        self._sum: Tensor | None = None  # float64 [C]
        self._weight = 0

    def add(self, states: Tensor, start: int) -> None:
        """Take states [t, C] of the positions from `start` on, t > 0; chunks come in order, the first at any start."""
        count = states.shape[0]
        if self.pooling == "last":
            self._sum, self._weight = states[-1].double(), 1
            return
        if self.pooling == "weighted_mean":
            weights = torch.arange(start + 1, start + count + 1, dtype=torch.float64, device=states.device)
            chunk, weight = weights @ states.double(), count * (2 * start + count + 1) // 2
        else:
            assert self.pooling == "mean", self.pooling
            chunk, weight = states.sum(0, dtype=torch.float64), count
        self._sum = chunk if self._sum is None else self._sum + chunk
        self._weight += weight

    def vector(self) -> Tensor:
        """The pooled states, float32 [C]."""
        assert self._sum is not None
        return (self._sum / self._weight).float()
