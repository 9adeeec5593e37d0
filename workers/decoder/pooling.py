"""One vector from the states of a whole sequence, which arrive in chunks. C width of a state, t states of a chunk."""

from __future__ import annotations

import torch
from torch import Tensor


class Pool:
    """`mean` of all positions; `last`: the last one's; `weighted_mean`: position i weighs i + 1 (Muennighoff 2022).

    Sums are kept in float64, so that it makes no difference to the float32 vector where chunks end. Positions before
    `pooled_from` count for nothing.
    """

    def __init__(self, pooling: str, pooled_from: int = 0) -> None:
        self.pooling = pooling
        self.pooled_from = pooled_from
        self.end: int | None = None  # the position after the last chunk
        self._sum: Tensor | None = None  # float64 [C]
        self._weight = 0

    def add(self, states: Tensor, start: int) -> None:
        """Take states [t, C] of the positions from `start` on, t > 0; chunks come in order, the first at any start."""
        self.end = start + states.shape[0]
        skipped = max(0, self.pooled_from - start)
        states, start = states[skipped:], start + skipped
        count = states.shape[0]
        if count == 0:
            return
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

    def vector(self) -> Tensor | None:
        """The pooled states, float32 [C]; None where no position was pooled."""
        return None if self._sum is None else (self._sum / self._weight).float()
