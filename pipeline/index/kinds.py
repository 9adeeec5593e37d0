"""Which kind of index `auto` is: the rule in one place, a function of the numbers of vectors, dimensions and bytes.

    up to 50,000 vectors     exact: Flat, and where the memory does not hold it, SQ8
    up to 250,000            HNSW32, and where the memory does not hold it, HNSW32,SQ8 and then as below
    more                     IVF with about 4 * sqrt(n) lists: Flat, then SQ8, then PQ of d/4 and of d/8 bytes

The first that fits is taken. It never depends on the machine, so that the same job has the same index everywhere.
Reasons: below 50,000 vectors a scan takes milliseconds and is exact. HNSW answers single queries fastest, and is slow
to build and large. SQ8 costs little recall at a quarter of the size; product quantization much, and comes last.

n: vectors; d: width of a vector; k: lists.
"""

from __future__ import annotations

from typing import Any, Final

import faiss

from pipeline.errors import UserError

AUTO: Final = "auto"
DEFAULT_MEMORY_BYTES: Final = 8 << 30
FLAT_VECTORS: Final = 50_000
HNSW_VECTORS: Final = 250_000

_HNSW_LINKS: Final = 32
_TRAINING_PER_LIST: Final = 64
_PQ_TRAINING: Final = 1 << 14  # a product quantizer of 8 bits wants about 10,000 vectors


def choose_kind(num_vectors: int, dimension: int, memory_bytes: int = DEFAULT_MEMORY_BYTES) -> str:
    """The factory string of the first kind of the rule whose index is at most `memory_bytes` large.

    UserError where none is.

    >>> choose_kind(1_000_000, 384)
    'IVF2048,Flat'
    >>> choose_kind(1_000_000, 384, 1 << 30)
    'IVF2048,SQ8'
    """
    kinds = _candidates(num_vectors, dimension)
    for kind in kinds:
        if index_bytes(kind, num_vectors, dimension) <= memory_bytes:
            return kind
    least = min(index_bytes(kind, num_vectors, dimension) for kind in kinds)
    raise UserError(
        f"index.memory_bytes {memory_bytes:,}: no kind of index holds {num_vectors:,} vectors of {dimension} in it; "
        f"give it at least {least:,}, or name a smaller index.kind"
    )


def index_bytes(kind: str, num_vectors: int, dimension: int) -> int:
    """About what an index of this kind takes in memory, and its files on the disk.

    RuntimeError where FAISS doesn't know the factory string.
    """
    return _bytes_of(faiss.index_factory(dimension, kind, faiss.METRIC_INNER_PRODUCT), num_vectors)


def _candidates(num_vectors: int, dimension: int) -> list[str]:
    if num_vectors <= FLAT_VECTORS:
        return ["Flat", "SQ8", *(_quantized(dimension) if num_vectors >= _PQ_TRAINING else ())]
    lists = f"IVF{num_lists(num_vectors)}"
    kinds = [f"{lists},Flat", f"{lists},SQ8", *(f"{lists},{codes}" for codes in _quantized(dimension))]
    if num_vectors <= HNSW_VECTORS:
        kinds = [f"HNSW{_HNSW_LINKS}", f"HNSW{_HNSW_LINKS},SQ8", *kinds]
    return kinds


def num_lists(num_vectors: int) -> int:
    """k: the power of two next below 4 * sqrt(n) with at least 64 vectors a list, to train on.

    >>> num_lists(1_000_000)
    2048
    """
    most = max(min(int(4 * num_vectors**0.5), num_vectors // _TRAINING_PER_LIST), 1)
    return 1 << (most.bit_length() - 1)


def _quantized(dimension: int) -> list[str]:
    """Product quantizers of about d/4 and d/8 bytes a vector; FAISS wants the number of bytes to divide d."""
    sizes = [
        max(size for size in range(1, dimension // share + 1) if dimension % size == 0)
        for share in (4, 8)
        if dimension >= share
    ]
    return [f"PQ{size}" for size in dict.fromkeys(sizes)]


def _bytes_of(index: Any, num_vectors: int) -> int:
    inner: Any = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        return _bytes_of(inner.index, num_vectors)
    if isinstance(inner, faiss.IndexIDMap):
        return 8 * num_vectors + _bytes_of(inner.index, num_vectors)
    if isinstance(inner, faiss.IndexRefine):
        return _bytes_of(inner.base_index, num_vectors) + _bytes_of(inner.refine_index, num_vectors)
    if isinstance(inner, faiss.IndexHNSW):
        graph: Any = inner.hnsw
        links = 2 * int(graph.nb_neighbors(1)) * 4 + 16  # on the lowest level twice as many, higher ones hardly count
        return _bytes_of(inner.storage, num_vectors) + num_vectors * links
    if isinstance(inner, faiss.IndexIVF):
        return num_vectors * (inner.code_size + 8) + inner.nlist * inner.d * 4
    return num_vectors * (inner.code_size if isinstance(inner, faiss.IndexFlatCodes) else 4 * inner.d)
