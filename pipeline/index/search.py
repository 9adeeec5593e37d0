"""Nearest vectors by inner product, the same whatever the number of shards, of queries asked together, or of threads.

FAISS finds candidates in float32, whose rounding depends on where a vector lies and how many queries there are. For
Flat the candidates' scores are then computed anew, each by itself in float64, and a bound on FAISS's rounding shows
that no other vector can belong to the best; where it can't (many vectors score alike), more candidates are asked for,
and then all within the bound are looked at. Ties go to the lower vector number. Approximate kinds keep FAISS's scores.

d: width of a vector; n: vectors of a shard; q: queries; k: hits a query.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
import numpy.typing as npt

from pipeline.errors import JobError, UserError
from pipeline.index import faiss_files
from pipeline.index.centering import Centering
from pipeline.index.deletions import read_deleted
from pipeline.index.effort import search_parameters
from pipeline.index.kinds import FLAT
from pipeline.index.manifest import IndexManifest, Shard, read_manifest
from pipeline.index.row_map import Place, RowMap
from pipeline.index.selection import Mask, keeping_to, search_allowed, sparse_numbers, standing_mask, unnumbered
from pipeline.index.soundness import refuse_unsound_shard

Matrix = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

_EXTRA_CANDIDATES: Final = (2, 64)  # in turn, the second of queries that the first leaves in doubt
_VECTORS_AT_ONCE: Final = 1 << 14
_SCORED_VALUES: Final = 1 << 18
_SKIPPING_SHARE: Final = 0.5
_QUERIES_AT_ONCE: Final = 1 << 14  # FAISS goes over all vectors once for many queries, so many are asked together


@dataclass(frozen=True, slots=True)
class Hit:
    """A vector near the query: its number, its inner product with the query, and what it belongs to."""

    vector: int
    score: float
    place: Place


class IndexShard:
    """One shard's vectors, ready to be searched with its own effort. May be used by several threads at once."""

    def __init__(self, index: Any, contents: Shard, *, kind: str, deleted: Numbers | None = None) -> None:
        """`deleted`: vector numbers of the index that are never found, ascending."""
        self._index = index
        self._settle(contents, deleted)
        self._numbers = sparse_numbers(index, contents)
        self._matrix: Matrix | None = None  # [held, d] of a Flat shard: FAISS's own memory
        if kind == FLAT and contents.num_held:
            self._flat, _ = unnumbered(index, contents.first_vector)
            self._matrix = flat_matrix(index)
            self._longest = max(
                float(np.sqrt(np.einsum("ij,ij->i", block, block, dtype=np.float64).max()))
                for block in np.array_split(self._matrix, -(-len(self._matrix) // _VECTORS_AT_ONCE))
            )

    @staticmethod
    def load(folder: Path, manifest: IndexManifest, number: int) -> IndexShard:
        """JobError if a file of the shard, or of deletions, is missing, damaged or not sound. Memory: their size."""
        shard = manifest.shards[number]
        deleted = read_deleted(folder, manifest)
        index = faiss_files.read_shard(folder, shard, dimension=manifest.dimension)
        refuse_unsound_shard(index, folder / shard.file, shard, exact=manifest.kind == FLAT, deleted=deleted)
        return IndexShard(index, shard, kind=manifest.kind, deleted=deleted)

    def as_of(self, contents: Shard, deleted: Numbers | None) -> IndexShard:
        """The same vectors in memory, as another version of the index has them; `contents` is of the same file."""
        other = copy.copy(self)
        other._settle(contents, deleted)
        return other

    def _settle(self, contents: Shard, deleted: Numbers | None) -> None:
        self._contents = contents
        self._standing = standing_mask(self._index, contents, deleted)
        # What a search that asks for all is told: nothing, where all that is held may be found.
        holds_others = self._standing is not None and np.count_nonzero(self._standing) < contents.num_held
        self._left = self._standing if holds_others else None

    @property
    def first_vector(self) -> int:
        return self._contents.first_vector

    @property
    def num_vectors(self) -> int:
        """How many numbers it stands for, those of deleted vectors too."""
        return self._contents.num_vectors

    def share_of(self, allowed: Mask | None) -> Mask | None:
        """This shard's share of a mask over all vectors of the index."""
        return None if allowed is None else allowed[self.first_vector : self.first_vector + self.num_vectors]

    def search(self, queries: Matrix, k: int, allowed: Mask | None = None) -> tuple[Scores, Numbers]:
        """Scores and vector numbers [q, min(k, n)], best first; number -1 where fewer can be found.

        `allowed` [n] says which of the shard's vectors may be found; None for all but the deleted ones.
        """
        allowed = self._findable(allowed)
        k = min(k, self._contents.num_held if allowed is None else int(np.count_nonzero(allowed)))
        if k == 0 or not len(queries):
            return np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
        if self._matrix is not None:
            if allowed is not None and self._numbers is not None:
                allowed = allowed[self._numbers - self.first_vector]
            found = [
                self._search_flat(self._matrix, queries[start : start + _QUERIES_AT_ONCE], k, allowed)
                for start in range(0, len(queries), _QUERIES_AT_ONCE)
            ]
            return np.concatenate([scores for scores, _ in found]), np.concatenate([numbers for _, numbers in found])
        if allowed is not None:
            return best([self._search_allowed(queries, k, allowed)], k)
        rough, numbers = self._index.search(queries, k, params=search_parameters(self._index, self._contents.effort))
        scores = rough.astype(np.float64)
        short = (numbers < 0).any(axis=1)
        if short.any():  # where it looks there are fewer than k, and elsewhere there are more
            every = np.ones(self.num_vectors, np.bool_) if self._standing is None else self._standing
            scores[short], numbers[short] = self._search_allowed(queries[short], k, every)
        return best([(scores, numbers)], k)

    def _search_allowed(self, queries: Matrix, k: int, allowed: Mask) -> tuple[Scores, Numbers]:
        return search_allowed(
            self._index,
            queries,
            k,
            allowed,
            first_vector=self.first_vector,
            effort=self._contents.effort,
            numbers=self._numbers,
            num_held=self._contents.num_held,
        )

    def _findable(self, allowed: Mask | None) -> Mask | None:
        """[n] of `allowed` those that are held and not deleted; None where nobody asked for fewer than are held."""
        if allowed is not None:
            return allowed if self._standing is None else allowed & self._standing
        return self._left

    def _search_flat(self, matrix: Matrix, queries: Matrix, k: int, allowed: Mask | None) -> tuple[Scores, Numbers]:
        scores, places = self._nearest_places(matrix, queries, k, allowed)
        return scores, places + self.first_vector if self._numbers is None else self._numbers[places]

    def _nearest_places(
        self, matrix: Matrix, queries: Matrix, k: int, allowed: Mask | None, turn: int = 0
    ) -> tuple[Scores, Numbers]:
        """Places are from 0, in the file. `turn`: which number of extra candidates is asked for."""
        extra = _EXTRA_CANDIDATES[turn]
        share = 1.0 if allowed is None else np.count_nonzero(allowed) / len(allowed)
        # FAISS is fast at many queries only where it skips nothing: if most are allowed, it is to look at all.
        skips = share < _SKIPPING_SHARE
        only = keeping_to(allowed) if allowed is not None and skips else None
        num_candidates = min(k + extra, len(matrix))
        if not skips:
            num_candidates = min(int(k / share) + extra, len(matrix))
        rough, candidates = self._flat.search(queries, num_candidates, params=only)
        lengths = np.sqrt(np.square(queries, dtype=np.float64).sum(axis=1))
        # A float32 inner product is off by at most d * 2^-24 * |query| * |vector|; twice that is taken.
        slack = 2 * (matrix.shape[1] + 2) * 2.0**-24 * lengths * self._longest
        found = candidates >= 0
        at = np.maximum(candidates, 0)
        if allowed is not None:
            found &= allowed[at]
        scores, places = best([(_exact_scores(matrix, at, queries), np.where(found, candidates, -1))], k)
        complete = (num_candidates == len(matrix)) | (candidates[:, -1] < 0)  # nothing allowed is left out
        # `scores[:, -1]` is what the best k have at least; others could belong to them if FAISS's rounding hid it.
        in_doubt = (found.sum(axis=1) < k) | (~complete & (scores[:, -1] <= rough[:, -1] + slack))
        if turn + 1 < len(_EXTRA_CANDIDATES) and in_doubt.any():
            scores[in_doubt], places[in_doubt] = self._nearest_places(matrix, queries[in_doubt], k, allowed, turn + 1)
            in_doubt[:] = False
        for number in np.flatnonzero(in_doubt):
            query, last = queries[number : number + 1], scores[number, -1]
            if np.isfinite(last):
                radius = np.nextafter(np.float32(last - 2 * slack[number]), np.float32(-np.inf))
                _, _, near = self._flat.range_search(query, float(radius), params=only)
                near = near if allowed is None else near[allowed[near]]
            else:
                assert allowed is not None, "FAISS finds as many as there are"
                near = np.flatnonzero(allowed)
            (scores[number],), (places[number],) = best([(_exact_scores(matrix, near[None], query), near[None])], k)
        return scores, places


@dataclass(frozen=True, slots=True)
class VectorIndex:
    """A whole index: its shards in memory, its map of rows on the disk."""

    manifest: IndexManifest
    shards: tuple[IndexShard, ...]
    rows: RowMap
    centering: Centering | None = None

    @staticmethod
    def open(folder: Path) -> VectorIndex:
        """Loads the index in `folder` (OUT/index) after checking each file against its hash.

        UserError if there is none, JobError if it is damaged. Memory: the sum of the shards' files.
        """
        while True:
            manifest = read_manifest(folder)
            try:
                rows = RowMap(faiss_files.check_file(folder, manifest.rows))
                shards = tuple(IndexShard.load(folder, manifest, number) for number in range(len(manifest.shards)))
                return VectorIndex(manifest, shards, rows, read_centering(folder, manifest))
            except JobError:
                if read_manifest(folder) == manifest:  # or else another index was put here meanwhile
                    raise

    def search(
        self, vectors: npt.ArrayLike, k: int, *, allowed: Mask | None = None, threads: int | None = None
    ) -> list[list[Hit]]:
        """The k nearest vectors of each query in `vectors` [q, d] or [d], best first; fewer where there are fewer.

        Queries are vectors as parts hold them: where the index is centred they lose its mean here. `allowed` says of
        each vector of the index whether it may be found; None for all. Deleted ones never are.
        UserError for a query that is not of the index's width, or holds NaN, infinities or nothing but zeros.
        """
        queries = prepare_queries(vectors, self.manifest, self.centering)
        with faiss_files.faiss_threads(threads):
            found = [
                shard.search(
                    queries, k, None if allowed is None else allowed[shard.first_vector :][: shard.num_vectors]
                )
                for shard in self.shards
            ]
            scores, numbers = best(found, k)
        places = iter(self.rows.places(numbers[numbers >= 0]))
        return [
            [
                Hit(number, score, next(places))
                for number, score in zip(numbers[query].tolist(), scores[query].tolist(), strict=True)
                if number >= 0
            ]
            for query in range(len(queries))
        ]


def search_index(folder: Path, vectors: npt.ArrayLike, k: int, *, threads: int | None = None) -> list[list[Hit]]:
    """Opens the index in `folder` (OUT/index) for one search; see `VectorIndex`."""
    return VectorIndex.open(folder).search(vectors, k, threads=threads)


def read_centering(folder: Path, manifest: IndexManifest) -> Centering | None:
    """What is taken out of an index's vectors and queries. JobError if its file is missing or damaged."""
    if manifest.center is None:
        return None
    return Centering.read(faiss_files.check_file(folder, manifest.center), manifest.dimension)


def prepare_queries(vectors: npt.ArrayLike, manifest: IndexManifest, centering: Centering | None = None) -> Matrix:
    """Queries [q, d] as the index compares them: float32, of length 1 where its vectors are. UserError as `search`."""
    queries = _compared(vectors, manifest, centering)
    if centering is not None and not queries.any(axis=1).all():
        raise UserError("the query vector is the mean that the index is centred on: it has no direction from there")
    return queries


def have_direction(vectors: npt.ArrayLike, manifest: IndexManifest, centering: Centering | None) -> Mask:
    """[q] which of the vectors [q, d] can be queries: all but the mean that is taken out of them."""
    return np.asarray(_compared(vectors, manifest, centering).any(axis=1))


def _compared(vectors: npt.ArrayLike, manifest: IndexManifest, centering: Centering | None) -> Matrix:
    queries = np.atleast_2d(np.asarray(vectors))
    if queries.dtype.kind not in "fiu":
        raise UserError(f"the query vector is of type {queries.dtype}, not of numbers")
    if queries.ndim != 2 or queries.shape[1] != manifest.dimension:
        shape = " x ".join(map(str, np.shape(vectors)))
        raise UserError(f"the query vector has shape {shape}, and the index holds vectors of {manifest.dimension}")
    exact = queries.astype(np.float64)
    lengths = np.sqrt(np.square(exact).sum(axis=1, keepdims=True))
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise UserError("the query vector holds NaN or infinities, or is all zeros")
    if manifest.provenance.normalisation == "unit":
        exact /= lengths
    return exact.astype(np.float32) if centering is None else centering.apply(exact.astype(np.float32))


def best(found: Sequence[tuple[Scores, Numbers]], k: int) -> tuple[Scores, Numbers]:
    """Merges shards' answers, each [q, any number], into the best k [q, min(k, all)]: by score, ties by vector number.

    Number -1 stands for nothing found and comes last.
    """
    scores, numbers = (
        found[0] if len(found) == 1 else (np.concatenate(each, axis=1) for each in zip(*found, strict=True))
    )
    nothing = (numbers < 0) | np.isnan(scores)
    if nothing.any():
        scores, numbers = np.where(nothing, -np.inf, scores), np.where(nothing, -1, numbers)
    order = np.lexsort((numbers, -scores), axis=1)[:, :k]
    queries = np.arange(len(order))[:, None]
    return scores[queries, order], numbers[queries, order]


def _exact_scores(matrix: Matrix, places: Numbers, queries: Matrix) -> Scores:
    """Inner products of `matrix[places[i]]` with `queries[i]`, [q, c] like `places`; equal vectors score equal wherever
    they lie. Memory: about _SCORED_VALUES values at a time."""
    num_queries, count = places.shape
    scores = np.empty(places.shape)
    few = max(1, _SCORED_VALUES // max(1, count * matrix.shape[1]))  # queries at a time
    many = max(1, _SCORED_VALUES // matrix.shape[1])  # vectors of a query at a time
    for start in range(0, num_queries, few):
        query = queries[start : start + few, None].astype(np.float64)
        for first in range(0, count, many):
            block = np.s_[start : start + few, first : first + many]
            # Multiplied and then summed vector by vector: matrix products add up in an order that depends on the place.
            scores[block] = (matrix[places[block]] * query).sum(axis=2)
    return scores


def flat_matrix(index: Any) -> Matrix:
    """The vectors [n, d] of a Flat index or one with an id map around it: FAISS's own memory, which `index` keeps."""
    inner: Any = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap) else index
    values = faiss.rev_swig_ptr(inner.get_xb(), index.ntotal * index.d)
    matrix: Matrix = values.reshape(index.ntotal, index.d)
    return matrix
