"""Hidden states of embedding requests, pooled as their chunks arrive, into vectors of unit length."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import RowError
from workers.engine.request import EmbedRequest
from workers.engine.scheduler import StepBatch
from workers.engine.sequence import Sequence

Vector = npt.NDArray[np.float32]


class Vectors:
    """Pools under way. A sequence that is preempted starts over, from its first position."""

    def __init__(self) -> None:
        self._sums: dict[Sequence, torch.Tensor] = {}

    def forget(self, sequence: Sequence) -> None:
        self._sums.pop(sequence, None)

    def take(self, hidden: torch.Tensor, batch: StepBatch) -> list[tuple[Sequence, Vector | RowError]]:
        """Add the step's hidden states [T, C] -> the embedding sequences that are done, each set to its end."""
        done: list[tuple[Sequence, Vector | RowError]] = []
        if not batch.pooled_rows:
            return done
        ends = list(accumulate(batch.counts))
        for row in batch.pooled_rows:
            sequence, start, count = batch.sequences[row], batch.starts[row], batch.counts[row]
            assert isinstance(sequence.request, EmbedRequest)
            states = hidden[ends[row] - count : ends[row]].float()  # [count, C]
            pooling = sequence.request.pooling
            if pooling == "last":
                total = states[-1]
            else:
                if pooling == "weighted_mean":
                    weights = torch.arange(start + 1, start + count + 1, dtype=torch.float32, device=states.device)
                    states = states * weights[:, None]
                total = states.sum(0)
                if start:
                    total = total + self._sums[sequence]
            if start + count < sequence.num_prompt:
                self._sums[sequence] = total
            else:
                self._sums.pop(sequence, None)
                done.append((sequence, _unit(total.cpu().numpy())))
        for sequence, _ in done:
            sequence.ended_by = "vector"
        return done


def _unit(total: Vector) -> Vector | RowError:
    """A sum or a mean, scaled to length 1: which of them it was makes no difference."""
    length = float(np.linalg.norm(total.astype(np.float64)))
    if not np.isfinite(length) or length == 0:
        return RowError("nonfinite", f"the vector's length is {length}")
    return (total / np.float32(length)).astype(np.float32)
