"""Hidden states of embedding requests, pooled as their chunks arrive, into vectors of unit length."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import RowError
from workers.decoder.pooling import Pool
from workers.engine.request import EmbedRequest
from workers.engine.scheduler import StepBatch
from workers.engine.sequence import Sequence

Vector = npt.NDArray[np.float32]


class Vectors:
    """Pools under way. A sequence that is preempted starts over."""

    def __init__(self) -> None:
        self._pools: dict[Sequence, Pool] = {}

    def forget(self, sequence: Sequence) -> None:
        self._pools.pop(sequence, None)

    def take(self, hidden: torch.Tensor, batch: StepBatch) -> list[tuple[Sequence, Vector | RowError]]:
        """Add the step's hidden states [T, C] -> the embedding sequences that are done, each set to its end."""
        done: list[tuple[Sequence, Vector | RowError]] = []
        if not batch.pooled_rows:
            return done
        ends = list(accumulate(batch.counts))
        for row in batch.pooled_rows:
            sequence, start, count = batch.sequences[row], batch.starts[row], batch.counts[row]
            assert isinstance(sequence.request, EmbedRequest)
            if start == 0 or sequence not in self._pools:  # not there: its beginning was found in the cache
                self._pools[sequence] = Pool(sequence.request.pooling)
            pool = self._pools[sequence]
            pool.add(hidden[ends[row] - count : ends[row]], start)
            if start + count == sequence.num_prompt:
                del self._pools[sequence]
                done.append((sequence, _unit(pool.vector().cpu().numpy())))
        for sequence, _ in done:
            sequence.ended_by = "vector"
        return done


def _unit(vector: Vector) -> Vector | RowError:
    length = float(np.linalg.norm(vector.astype(np.float64)))
    if not np.isfinite(length) or length == 0:
        return RowError("nonfinite", f"the vector's length is {length}")
    return (vector / np.float64(length)).astype(np.float32)
