"""Search among some of a shard's vectors: those that a filter leaves, without those that were deleted.

FAISS skips what is not allowed while it searches, so that the k best are the k best of the allowed ones. Approximate
kinds are searched wider by as much as vectors are left out. Where few are allowed, or the search comes back with fewer
than k, the allowed vectors are scanned one and all, as the index keeps them.

n: numbers of the shard; q: queries; k: hits a query. A place is a vector's number without the shard's first number.
"""

from __future__ import annotations

import math
from typing import Any, Final

import faiss
import numpy as np
import numpy.typing as npt

from pipeline.index.manifest import Shard
from pipeline.index.soundness import held_numbers

Matrix = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# Below this share of allowed vectors a graph's walk mostly meets forbidden ones, and a scan is as fast and exact.
_LEAST_SHARE: Final = 0.25
_BLOCK_BYTES: Final = 16 << 20
_faiss: Final[Any] = faiss  # its type stubs know no constructor of parameters that takes any


def standing_mask(index: Any, shard: Shard, deleted: Numbers | None) -> Mask | None:
    """[n] which of the shard's numbers are of vectors that it holds and that were not deleted; None where all are.

    `deleted` holds vector numbers of the whole index, ascending.
    """
    first = shard.first_vector
    mask = np.ones(shard.num_vectors, np.bool_)
    if deleted is not None:
        low, high = np.searchsorted(deleted, (first, first + shard.num_vectors))
        mask[deleted[low:high] - first] = False
    if shard.absent:
        held = np.zeros(shard.num_vectors, np.bool_)
        numbers = held_numbers(index)
        assert numbers is not None, "a shard that lacks vectors keeps the numbers of the others"
        held[numbers - first] = True
        mask &= held
    return None if mask.all() else mask


def sparse_numbers(index: Any, shard: Shard) -> Numbers | None:
    """The number of each place of a shard that lacks some; None where places follow, or lists keep the numbers."""
    outer: Any = faiss.downcast_index(index)
    return faiss.vector_to_array(outer.id_map) if shard.absent and isinstance(outer, faiss.IndexIDMap) else None


def selector(allowed: Mask, offset: int = 0) -> Any:
    """FAISS's form of `allowed`, whose first vector FAISS knows by the id `offset`."""
    if offset:
        allowed = np.concatenate([np.zeros(offset, np.bool_), allowed])
    return _faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))


def keeping_to(allowed: Mask) -> Any:
    """Parameters of the search of a Flat index that has its vectors at their places."""
    return _faiss.SearchParameters(sel=selector(allowed))


def unnumbered(index: Any, first_vector: int) -> tuple[Any, int]:
    """What lies below an index's map of numbers, and the id that the first vector has there.

    FAISS's id map translates a selector's numbers for the index right below it and no deeper, so that filters under it
    name places, not numbers. Inverted lists keep numbers themselves.
    """
    inner: Any = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexIDMap):
        return faiss.downcast_index(inner.index), 0
    return inner, first_vector


def search_allowed(
    index: Any,
    queries: Matrix,
    k: int,
    allowed: Mask,
    *,
    first_vector: int,
    effort: int | None,
    numbers: Numbers | None = None,
    num_held: int | None = None,
) -> tuple[Scores, Numbers]:
    """Scores and vector numbers [q, min(k, number allowed)] of a shard of an approximate kind, best first.

    `effort` is what the shard takes where all are allowed (see `effort`). Of a shard that lacks some of its numbers,
    `allowed` [n] allows none of those, `num_held` are left, and `numbers` are as `sparse_numbers` says.
    """
    inner, first_id = unnumbered(index, first_vector)
    if numbers is not None:
        allowed = allowed[numbers - first_vector]
    places = np.flatnonzero(allowed)
    k = min(k, len(places))
    if k == 0:
        return np.empty((len(queries), 0)), np.empty((len(queries), 0), np.int64)
    only = selector(allowed, first_id)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    ids = np.full((len(queries), k), -1, np.int64)
    share = len(places) / (num_held or len(allowed))
    parameters = _parameters(inner, only, effort, 1 / share) if share >= _LEAST_SHARE else None
    if parameters is not None:
        scores, ids = inner.search(queries, k, params=parameters)
    short = (ids < 0).any(axis=1)
    if short.any():
        scores[short], ids[short] = _scan(inner, np.ascontiguousarray(queries[short]), k, only, places, first_id)
    found = ids - first_id + first_vector if numbers is None else numbers[ids]
    return scores.astype(np.float64), np.where(ids < 0, -1, found)


def _parameters(index: Any, only: Any, effort: int | None, widening: float) -> Any | None:
    """What makes FAISS's search keep to `only`, `widening` times as wide; None for kinds that can't be told."""
    inner: Any = faiss.downcast_index(index)
    match inner:
        case faiss.IndexPreTransform():
            below = _parameters(inner.index, only, effort, widening)
            return None if below is None else _faiss.SearchParametersPreTransform(index_params=below)
        case faiss.IndexRefine():
            base = _parameters(inner.base_index, only, effort, widening)
            if base is None:
                return None
            return _faiss.IndexRefineSearchParameters(k_factor=inner.k_factor, base_index_params=base)
        case faiss.IndexIVF():
            num_lists = math.ceil((effort or inner.nprobe) * widening)
            return _faiss.SearchParametersIVF(sel=only, nprobe=min(num_lists, inner.nlist))
        case faiss.IndexHNSW():
            width = math.ceil((effort or inner.hnsw.efSearch) * widening)
            return _faiss.SearchParametersHNSW(sel=only, efSearch=width)
        case faiss.IndexFlat() | faiss.IndexScalarQuantizer():
            return _faiss.SearchParameters(sel=only)
        case _:
            return None


def _scan(index: Any, queries: Matrix, k: int, only: Any, places: Numbers, first_id: int) -> tuple[Matrix, Numbers]:
    """The k best [q, k] of all vectors at `places`, by the scores that the index would give them."""
    inner: Any = faiss.downcast_index(index)
    match inner:
        case faiss.IndexPreTransform():
            chain: Any = inner.chain
            for number in range(chain.size()):
                queries = faiss.downcast_VectorTransform(chain.at(number)).apply(queries)
            return _scan(inner.index, queries, k, only, places, first_id)
        case faiss.IndexRefine():
            return _scan(inner.refine_index, queries, k, only, places, first_id)
        case faiss.IndexIVF():
            parameters = _faiss.SearchParametersIVF(sel=only, nprobe=inner.nlist)
        case faiss.IndexFlat() | faiss.IndexScalarQuantizer():
            parameters = _faiss.SearchParameters(sel=only)
        case _:
            return _scan_decoded(inner, queries, k, places)
    scores, ids = inner.search(queries, k, params=parameters)
    return scores, ids


def _scan_decoded(index: Any, queries: Matrix, k: int, places: Numbers) -> tuple[Matrix, Numbers]:
    exact = queries.astype(np.float64)
    step = max(_BLOCK_BYTES // (4 * index.d), 1)
    scores, ids = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start in range(0, len(places), step):
        block = places[start : start + step]
        found = (exact @ index.reconstruct_batch(block).astype(np.float64).T).astype(np.float32)  # [q, block]
        scores = np.concatenate([scores, found], axis=1)
        ids = np.concatenate([ids, np.broadcast_to(block, found.shape)], axis=1)
        order = np.lexsort((ids, -scores), axis=1)[:, :k]
        scores, ids = np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
    return scores, ids
