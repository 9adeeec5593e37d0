"""States of requests that want a vector, pooled as their chunks arrive, into vectors of unit length.

T tokens of a step, C model width, W router width: the experts of all layers that have a router.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from pipeline.embedding import VectorForm
from pipeline.errors import RowError
from workers.decoder.pooling import Pool
from workers.engine.request import VectorRequest
from workers.engine.scheduler import StepBatch
from workers.engine.sequence import Sequence

Vector = npt.NDArray[np.float32]


class Vectors:
    """Pools under way. A sequence that is preempted starts over."""

    def __init__(self) -> None:
        self._pools: dict[Sequence, Pool] = {}

    def forget(self, sequence: Sequence) -> None:
        self._pools.pop(sequence, None)

    def take(
        self, hidden: torch.Tensor, routing: torch.Tensor | None, batch: StepBatch
    ) -> list[tuple[Sequence, Vector | RowError]]:
        """Add the step's hidden states [T, C] and what routers said [T, W] -> the sequences whose vectors are done."""
        done: list[tuple[Sequence, Vector | RowError]] = []
        if not batch.pooled_rows:
            return done
        ends = list(accumulate(batch.counts))
        for row in batch.pooled_rows:
            sequence, start, count = batch.sequences[row], batch.starts[row], batch.counts[row]
            wanted = sequence.request.vector
            assert wanted is not None
            pool = self._pools.get(sequence)
            if pool is None or pool.end != start:  # its beginning was found in the cache, or it starts over
                pool = self._pools[sequence] = Pool(wanted.form.pooling, wanted.pooled_from)
            states = hidden[ends[row] - count : ends[row]]
            if wanted.form.routing_weight:
                assert routing is not None
                states = torch.cat([states.float(), routing[ends[row] - count : ends[row]]], dim=1)  # [t, C + W]
            pool.add(states, start)
            if start + count == sequence.num_prompt:
                done.append((sequence, _finished(pool.vector(), wanted, hidden.shape[1])))
        for sequence, _ in done:
            del self._pools[sequence]
        return done


def _finished(pooled: torch.Tensor | None, wanted: VectorRequest, hidden_width: int) -> Vector | RowError:
    if pooled is None:
        return RowError("nonfinite", f"none of the {wanted.pooled_from} tokens is pooled: they are the prompt's")
    return shaped(pooled.cpu().numpy(), wanted.form, hidden_width)


def shaped(pooled: Vector, form: VectorForm, hidden_width: int) -> Vector | RowError:
    """Pooled states [C] or [C + W] -> the vector that `form` describes."""
    vector = _unit(pooled[: form.dimensions or hidden_width])
    if not form.routing_weight or isinstance(vector, RowError):
        return vector
    routing = _unit(pooled[hidden_width:])
    if isinstance(routing, RowError):
        return routing
    return _unit(np.concatenate([vector, np.float32(np.sqrt(form.routing_weight)) * routing]))


def _unit(vector: Vector) -> Vector | RowError:
    length = float(np.linalg.norm(vector.astype(np.float64)))
    if not np.isfinite(length) or length == 0:
        return RowError("nonfinite", f"the vector's length is {length}")
    return (vector / np.float64(length)).astype(np.float32)
