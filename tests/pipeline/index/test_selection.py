"""Search among some vectors: never a forbidden one, k where k are allowed, and of Flat just the best of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.index import faiss_files
from pipeline.index.manifest import Shard
from pipeline.index.search import IndexShard
from pipeline.index.selection import standing_mask

KINDS = [
    "Flat",
    "SQ8",
    "IVF8,Flat",
    "IVF8,PQ4x4",
    "IVF8,PQ4x4fs",
    "IVF8_HNSW8,SQ8",
    "HNSW8",
    "HNSW8,SQ8",
    "PQ4x4",
    "PQ4x4fs",
    "PCA8,Flat",
    "PCA8,SQ8",
    "PCA8,HNSW8",
    "PCA8,IVF8,Flat",
    "OPQ4,IVF8,PQ4x4",
    "PQ4x4,RFlat",
    "HNSW8,SQ8,RFlat",
    "IVF8,PQ4x4,RFlat",
    "PCA8,IVF8,PQ4x4,RFlat",
    "SQ8,Refine(SQfp16)",
    "IVF8,RaBitQ",
]
NUM_VECTORS = 600

Matrix = npt.NDArray[np.float32]


def unit(num_vectors: int, dimension: int = 16, *, seed: int = 0) -> Matrix:
    vectors = np.random.default_rng(seed).normal(size=(num_vectors, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@cache
def trained(kind: str) -> Any:
    index: Any = faiss.index_factory(16, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(unit(NUM_VECTORS))
    return index


def shard_of(vectors: Matrix, *, kind: str, first: int, effort: int | None = None, **options: Any) -> IndexShard:
    index: Any = faiss_files.with_numbers(faiss.clone_index(trained(kind)), first)
    faiss_files.add_numbered(index, vectors, np.arange(first, first + len(vectors)))
    contents = Shard(file="", sha256="", size_bytes=0, first_vector=first, num_vectors=len(vectors), effort=effort)
    return IndexShard(index, contents, kind=kind, **options)


def best_allowed(vectors: Matrix, allowed: npt.NDArray[np.bool_], query: Matrix, k: int) -> list[int]:
    scores = (vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1)
    return sorted(np.flatnonzero(allowed).tolist(), key=lambda number: (-scores[number], number))[:k]


@pytest.mark.parametrize("first", [0, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_finds_a_forbidden_vector_or_fewer_than_are_allowed(kind: str, first: int) -> None:
    vectors, queries = unit(NUM_VECTORS), unit(6, seed=1)
    effort = 1 if "IVF" in kind else None  # one list holds too few of almost any selection
    shard = shard_of(vectors, kind=kind, first=first, effort=effort)
    chance = np.random.default_rng(2)
    for share in (0.9, 0.5, 0.26, 0.1, 0.01, 0.0):
        allowed = chance.random(NUM_VECTORS) < share
        for k in (10, NUM_VECTORS):
            scores, numbers = shard.search(queries, k, allowed)
            assert numbers.shape == (6, min(k, allowed.sum()))
            assert all(len(set(line)) == len(line) for line in numbers.tolist())
            assert allowed[numbers - first].all()
            assert (np.diff(scores, axis=1) <= 0).all()


@pytest.mark.parametrize("deleted", [None, np.arange(1000, 1100)])
@pytest.mark.parametrize("kind", ["IVF8,Flat", "OPQ4,IVF8,PQ4x4", "PCA8,IVF8,PQ4x4,RFlat", "HNSW8"])
def test_as_many_are_found_as_are_asked_for_also_where_the_lists_looked_at_hold_fewer(kind: str, deleted: Any) -> None:
    shard = shard_of(unit(NUM_VECTORS), kind=kind, first=1000, effort=1, deleted=deleted)
    left = 1000 + np.arange(0 if deleted is None else 100, NUM_VECTORS)
    for k in (10, 300, NUM_VECTORS):
        scores, numbers = shard.search(unit(6, seed=1), k)
        assert all(len(set(line)) == min(k, len(left)) for line in numbers.tolist())
        assert np.isin(numbers, left).all()
        assert (np.diff(scores, axis=1) <= 0).all()


@pytest.mark.parametrize("kind", ["HNSW8", "PCA8,HNSW8", "IVF8,Flat", "HNSW8,SQ8,RFlat"])
def test_where_few_are_allowed_an_approximate_kind_is_as_good_as_what_it_keeps(kind: str) -> None:
    vectors, queries = unit(NUM_VECTORS), unit(20, seed=1)
    allowed = np.random.default_rng(2).random(NUM_VECTORS) < 0.1
    _, numbers = shard_of(vectors, kind=kind, first=7).search(queries, 5, allowed)
    kept = vectors
    if kind.startswith("PCA"):
        transform = faiss.PCAMatrix(16, 8)
        transform.train(vectors)
        kept, queries = transform.apply(vectors), transform.apply(queries)
    expected = [best_allowed(kept, allowed, query, 5) for query in queries]
    found = numbers - 7
    assert np.mean([len({*one} & {*other}) for one, other in zip(found.tolist(), expected, strict=True)]) > 4.9


def test_more_effort_is_taken_where_fewer_are_allowed() -> None:
    vectors, queries = unit(2000), unit(40, seed=1)
    shard = shard_of(vectors, kind="HNSW8", first=0, effort=40)

    def recall(allowed: npt.NDArray[np.bool_]) -> float:
        _, numbers = shard.search(queries, 10, allowed)
        pairs = zip(numbers.tolist(), queries, strict=True)
        return float(np.mean([len({*found} & {*best_allowed(vectors, allowed, query, 10)}) for found, query in pairs]))

    everything = recall(np.ones(2000, np.bool_))
    assert recall(np.random.default_rng(2).random(2000) < 0.3) > everything - 0.3


@settings(max_examples=40, deadline=None)
@given(
    copies=st.lists(st.integers(0, 11), min_size=1, max_size=200),
    chosen=st.lists(st.booleans(), min_size=200, max_size=200),
    share=st.sampled_from([0.0, 0.3, 0.9]),
    first=st.sampled_from([0, 5]),
    deleted=st.sets(st.integers(0, 199)),
    k=st.integers(1, 40),
)
def test_flat_finds_what_a_brute_force_over_the_allowed_finds(
    copies: list[int], chosen: list[bool], share: float, first: int, deleted: set[int], k: int
) -> None:
    """Most vectors are copies of each other, so that ties and rounding decide."""
    distinct = unit(12)
    vectors = distinct[np.array(copies)]
    allowed = np.array(chosen[: len(vectors)]) | (np.random.default_rng(0).random(len(vectors)) < share)
    gone = np.array(sorted(number + first for number in deleted if number < len(vectors)), np.int64)
    shard = shard_of(vectors, kind="Flat", first=first, deleted=gone)
    queries = np.concatenate([distinct[:1], unit(2, seed=1)])
    for mask in (allowed, None):
        left = np.ones(len(vectors), np.bool_) if mask is None else mask.copy()
        left[gone - first] = False
        _, numbers = shard.search(queries, k, mask)
        for place, query in enumerate(queries):
            assert (numbers[place] - first).tolist() == best_allowed(vectors, left, query, k)


def test_deletions_elsewhere_cost_a_shard_nothing() -> None:
    index: Any = faiss_files.with_numbers(faiss.clone_index(trained("Flat")), 10)
    shard = Shard(file="", sha256="", size_bytes=0, first_vector=10, num_vectors=20)
    assert standing_mask(index, shard, np.array([3, 90])) is None
    mask = standing_mask(index, shard, np.array([3, 12, 90]))
    assert mask is not None
    assert np.flatnonzero(~mask).tolist() == [2]


def test_a_selection_is_left_as_it_was_where_deletions_narrow_it() -> None:
    allowed = np.ones(20, np.bool_)
    shard = shard_of(unit(20), kind="Flat", first=0, deleted=np.arange(15))
    assert sorted(shard.search(unit(1), 20, allowed)[1][0].tolist()) == list(range(15, 20))
    assert allowed.all()
