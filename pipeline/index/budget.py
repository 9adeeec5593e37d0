"""What building an index takes in memory, and into how many shards it is cut so that this stays within a budget.

The budget is for what building adds to the process, or to all processes that build together. There are two moments:
training, on a sample; and adding, when the shards that are being built are held whole. A Flat shard is written as it
streams and never held. All here depends on numbers alone and never on the machine: a job has the same shards anywhere.

n: vectors; d: width of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import faiss

from pipeline.errors import UserError
from pipeline.index.effort import is_graph
from pipeline.index.kinds import (
    DEFAULT_MEMORY_BYTES,
    FLAT,
    SMALLER,
    TRAINING_OF_CODES,
    TRAINING_PER_LIST,
    bytes_of,
    least_training,
    make_index,
)
from pipeline.index.recall import num_queries

SHARD_VECTORS: Final = 1 << 20  # a larger index is cut, so that its shards can be built and searched side by side

_LEAST_SHARD_VECTORS: Final = 1024
_MOST_SAMPLE_BYTES: Final = 256 << 20
_MOST_BATCH_BYTES: Final = 4 << 20
_BATCHES: Final = 8  # read, decoded, centred, cut and compared at one time
_LIST_GROWTH: Final = 1.5  # lists of an IVF double when they are full
_BASE_BYTES: Final = 24 << 20  # queries, their answers, the map of rows, libraries' own buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildBudget:
    """How one kind is built. All sizes are estimates from above."""

    kind: str
    shards: int
    index_bytes: int  # of all shards, on the disk and when they are searched
    training_vectors: int  # 0 where the kind is not trained
    training_bytes: int
    shard_bytes: int  # what building one shard takes
    batch_bytes: int  # of vectors that are read at one time
    memory_bytes: int

    @property
    def side_by_side(self) -> int:
        """How many shards the budget lets be built at one time."""
        return max(min(self.shards, (self.memory_bytes - _BASE_BYTES) // max(self.shard_bytes, 1)), 1)

    def peak_bytes(self, workers: int) -> int:
        """What building takes at most where `workers` shards can be built side by side."""
        return _BASE_BYTES + max(self.training_bytes, self.shard_bytes * min(self.side_by_side, max(workers, 1)))


def build_budget(
    kind: str,
    num_vectors: int,
    dimension: int,
    *,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    shards: int | None = None,
    largest: int = 0,
) -> BuildBudget:
    """How `kind`, a FAISS factory string, is built within `memory_bytes`; `shards` None: as few as that allows.

    That is one shard for each SHARD_VECTORS vectors begun, and more only where one would not fit. They share the
    vectors equally, unless one is to hold as many as `largest`. UserError where the kind is none, or can't be built
    within the budget.
    """
    index = make_index(kind, dimension)
    batch_bytes = min(_MOST_BATCH_BYTES, max((memory_bytes - _BASE_BYTES) // 64, 4 * dimension))
    count = num_training_vectors(index, num_vectors, memory_bytes)
    most = max(num_vectors, 1)
    wanted = -(-most // SHARD_VECTORS) if shards is None else min(shards, most)

    def with_shards(number: int) -> BuildBudget:
        return BuildBudget(
            kind=kind,
            shards=number,
            index_bytes=num_vectors * _id_bytes(index, number) + bytes_of(index, num_vectors),
            training_vectors=count,
            training_bytes=2 * 4 * dimension * count,
            shard_bytes=_shard_bytes(index, kind, max(-(-num_vectors // number), largest)) + _BATCHES * batch_bytes,
            batch_bytes=batch_bytes,
            memory_bytes=memory_bytes,
        )

    budget = with_shards(wanted)
    if shards is None:
        while budget.peak_bytes(1) > memory_bytes and -(-num_vectors // (wanted + 1)) >= _LEAST_SHARD_VECTORS:
            wanted += max(wanted // 4, 1)
            budget = with_shards(wanted)
    if budget.peak_bytes(1) > memory_bytes and num_vectors:
        mend = "give it more" if shards is None else "leave index.shards to be chosen, or give it more"
        raise UserError(
            f"index.memory_bytes {memory_bytes:,}: building {kind} over {num_vectors:,} vectors of {dimension} in "
            f"{wanted} shard{'s' if wanted > 1 else ''} takes up to {budget.peak_bytes(1):,}; {mend}"
        )
    return budget


def num_training_vectors(index: Any, num_vectors: int, memory_bytes: int) -> int:
    """How many vectors to train on: 64 a list, enough for quantizers, within a quarter of the budget; 0 for none.

    Those that the recall is measured with are not among them.
    """
    if index.is_trained:
        return 0
    ivf = faiss.try_extract_index_ivf(index)
    num_lists = ivf.nlist if ivf is not None else 0
    most = min(_MOST_SAMPLE_BYTES, max(memory_bytes - _BASE_BYTES, 0) // 4) // (4 * index.d)
    left = num_vectors - num_queries(num_vectors)
    return int(min(max(TRAINING_PER_LIST * num_lists, TRAINING_OF_CODES), left, max(most, 1)))


def refuse_untrainable(budget: BuildBudget, num_vectors: int, dimension: int) -> None:
    """UserError where the kind can't be trained on so few vectors, which FAISS says only when they are all there."""
    least, count = least_training(budget.kind, dimension), budget.training_vectors
    if not num_vectors or count >= least:
        return
    is_cut = count < num_vectors - num_queries(num_vectors)
    why = f"index.memory_bytes {budget.memory_bytes:,} allows" if is_cut else f"of {num_vectors:,} there are"
    mend = f"{SMALLER}, or give it more" if is_cut else SMALLER
    raise UserError(
        f"index.kind {budget.kind!r} is trained on {least:,} vectors or more, and {why} {count:,} to train on; {mend}"
    )


def _shard_bytes(index: Any, kind: str, num_vectors: int) -> int:
    if kind == FLAT:
        return 0
    held = bytes_of(index, num_vectors) + 8 * num_vectors
    if is_graph(index):
        return held + num_vectors  # who was visited
    return int(held * _LIST_GROWTH) if faiss.try_extract_index_ivf(index) is not None else held


def _id_bytes(index: Any, shards: int) -> int:
    """Of the numbers that shards after the first keep of their vectors, where the kind itself keeps none."""
    return 8 if shards > 1 and faiss.try_extract_index_ivf(index) is None else 0
