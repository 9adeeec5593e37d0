"""Search equals a brute force in numpy, whatever the shards; damaged files give one line and never reach FAISS."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.commits import CommitLog
from pipeline.errors import JobError, UserError
from pipeline.index.build import build_index
from pipeline.index.manifest import Provenance, Shard
from pipeline.index.search import IndexShard, VectorIndex, best, prepare_queries, search_index
from pipeline.job_folder import JobFolder

Committed = Callable[..., tuple[JobFolder, CommitLog]]


def unit(num_vectors: int, dimension: int = 8, *, seed: int = 0) -> npt.NDArray[np.float32]:
    vectors = np.random.default_rng(seed).normal(size=(num_vectors, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force(vectors: npt.NDArray[np.float32], query: npt.NDArray[np.float32], k: int) -> list[tuple[int, float]]:
    """The k best (number, score): exact sums, ties to the lower number."""
    scores = [float((vector.astype(np.float64) * query.astype(np.float64)).sum()) for vector in vectors]
    return [(number, scores[number]) for number in sorted(range(len(vectors)), key=lambda i: (-scores[i], i))[:k]]


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("num_queries", [1, 3, 40])
def test_hits_equal_a_brute_force(committed: Committed, provenance: Provenance, shards: int, num_queries: int) -> None:
    vectors = unit(60)
    vectors[10:50] = vectors[10]  # more that score alike than the candidates FAISS is asked for
    vectors[[0, 55]] = np.nan
    folder, log = committed(vectors)
    build_index(folder, log.commits, job="mine", provenance=provenance, shards=shards)
    kept = vectors[~np.isnan(vectors).any(axis=1)]
    rows = np.flatnonzero(~np.isnan(vectors).any(axis=1))
    queries = np.concatenate([vectors[10:11], unit(num_queries - 1, seed=1)])
    index = VectorIndex.open(folder.index)
    for k in (1, 5, 1000):
        found = index.search(queries, k)
        for query, hits in zip(prepare_queries(queries, index.manifest), found, strict=True):
            assert [(hit.vector, hit.score) for hit in hits] == brute_force(kept, query, k)
            assert [hit.place.row for hit in hits] == [rows[hit.vector] for hit in hits]
            assert {hit.place.job for hit in hits} == {"mine"}


def test_plain_faiss_finds_the_same(committed: Committed, provenance: Provenance) -> None:
    vectors, queries = unit(300), unit(20, seed=1)
    folder, log = committed(vectors)
    build_index(folder, log.commits, job="mine", provenance=provenance)
    scores, numbers = faiss.read_index(str(folder.index / "shard-000.faiss")).search(queries, 10)
    found = search_index(folder.index, queries, 10)
    assert [[hit.vector for hit in hits] for hits in found] == numbers.tolist()
    np.testing.assert_allclose([[hit.score for hit in hits] for hits in found], scores, atol=1e-6)


def flat_shard(vectors: npt.NDArray[np.float32], first: int) -> IndexShard:
    index: Any = faiss.IndexFlatIP(vectors.shape[1])
    if first:
        index = faiss.IndexIDMap2(index)
        index.add_with_ids(vectors, np.arange(first, first + len(vectors)))
    else:
        index.add(vectors)
    contents = Shard(file="", sha256="", size_bytes=0, first_vector=first, num_vectors=len(vectors))
    return IndexShard(index, contents, kind="Flat")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    num_distinct=st.integers(1, 12),
    copies=st.lists(st.integers(0, 11), min_size=1, max_size=300),
    dimension=st.sampled_from([1, 3, 16, 65]),
    cuts=st.lists(st.integers(0, 300), max_size=3),
    nudge=st.sampled_from([0.0, 1e-7, 1e-6]),
    k=st.integers(1, 40),
)
def test_many_that_score_alike_are_told_apart_as_the_brute_force_does(
    num_distinct: int, copies: list[int], dimension: int, cuts: list[int], nudge: float, k: int
) -> None:
    """Corpora repeat themselves: most vectors here are copies, or differ by about the rounding of a float32 product."""
    distinct = unit(num_distinct, dimension)
    vectors = distinct[np.array(copies) % num_distinct]
    vectors = (vectors * (1 + nudge * np.arange(len(vectors))[:, None] % 5)).astype(np.float32)
    bounds = sorted({0, len(vectors), *(cut for cut in cuts if cut < len(vectors))})
    queries = np.concatenate([distinct[:1], unit(2, dimension, seed=1)])
    answers = [flat_shard(vectors[start:stop], start).search(queries, k) for start, stop in itertools.pairwise(bounds)]
    scores, numbers = best(answers, k)
    for place, query in enumerate(queries):
        expected = brute_force(vectors, query, k)
        assert list(zip(numbers[place].tolist(), scores[place].tolist(), strict=True)) == expected


def test_answers_of_shards_merge_by_score_and_then_by_number() -> None:
    one = (np.array([[0.9, 0.5, 0.0]]), np.array([[4, 2, -1]]))
    two = (np.array([[0.9, 0.5]]), np.array([[3, 9]]))
    scores, numbers = best([one, two], 10)
    assert numbers.tolist() == [[3, 4, 2, 9, -1]]
    assert scores.tolist() == [[0.9, 0.9, 0.5, 0.5, -np.inf]]
    assert best([two, one], 2)[1].tolist() == [[3, 4]]


def test_an_approximate_index_answers_with_faisss_scores(committed: Committed, provenance: Provenance) -> None:
    vectors = unit(400)
    folder, log = committed(vectors)
    build_index(folder, log.commits, job="mine", provenance=provenance, kind="IVF8,SQ8", shards=2)
    hits = search_index(folder.index, vectors[:50], 1)
    assert [hit[0].vector for hit in hits] == list(range(50))
    np.testing.assert_allclose([hit[0].score for hit in hits], 1, atol=0.2)  # codes cut off what training never saw


def test_queries_of_any_length_are_scaled_where_the_index_holds_unit_vectors(
    committed: Committed, provenance: Provenance
) -> None:
    folder, log = committed(unit(20))
    build_index(folder, log.commits, job="mine", provenance=provenance)
    index = VectorIndex.open(folder.index)
    (long,), (short,) = index.search(unit(1) * 1e20, 3), index.search(unit(1), 3)
    assert [hit.vector for hit in long] == [hit.vector for hit in short]
    assert long[0].score == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (np.ones(7), "shape 7, and the index holds vectors of 8"),
        (np.ones((2, 2, 8)), "shape 2 x 2 x 8"),
        (np.zeros(8), "all zeros"),
        (np.full(8, np.nan), "NaN"),
        (np.array(["a"] * 8), "not of numbers"),
    ],
)
def test_a_query_that_cannot_be_answered_is_one_line(
    committed: Committed, provenance: Provenance, query: Any, expected: str
) -> None:
    folder, log = committed(unit(9))
    build_index(folder, log.commits, job="mine", provenance=provenance)
    with pytest.raises(UserError, match=expected):
        search_index(folder.index, query, 3)


def test_a_folder_without_an_index_says_so(committed: Committed) -> None:
    folder, _ = committed(unit(9))
    with pytest.raises(UserError, match="there is no index in"):
        search_index(folder.index, np.ones(8), 3)


@pytest.mark.parametrize("kind", ["Flat", "IVF2,SQ8", "HNSW4"])
def test_damaged_files_give_one_line_and_faiss_never_sees_them(
    committed: Committed, provenance: Provenance, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A few hundred mutations: bytes flipped, cut off, added, zeroed; other files in their place; files removed."""
    folder, log = committed(unit(20))
    build_index(folder, log.commits, job="mine", provenance=provenance, kind=kind)
    whole = {path: path.read_bytes() for path in folder.index.iterdir()}
    seen: list[bytes] = []
    read_index = faiss.read_index

    def spy(path: str) -> Any:
        seen.append((folder.index / path).read_bytes())
        return read_index(path)

    monkeypatch.setattr(faiss, "read_index", spy)
    chance = random.Random(0)
    for turn in range(300):
        path = chance.choice(sorted(whole))
        content = bytearray(whole[path])
        place = chance.randrange(len(content))
        match turn % 5:
            case 0:
                content[place] ^= 1 << chance.randrange(8)
            case 1:
                del content[place:]
            case 2:
                content.extend(chance.randbytes(chance.randrange(1, 50)))
            case 3:
                content[place : place + 4] = b"\xff" * len(content[place : place + 4])
            case _:
                content = bytearray(whole[chance.choice(sorted(set(whole) - {path}))])
        if bytes(content) != whole[path]:
            path.write_bytes(content)
            with pytest.raises(JobError) as caught:
                VectorIndex.open(folder.index)
            assert "\n" not in str(caught.value)
            assert str(path) in str(caught.value)
            path.write_bytes(whole[path])
    for path in whole:
        os.rename(path, folder.root / "away")
        with pytest.raises((JobError, UserError)):
            VectorIndex.open(folder.index)
        os.rename(folder.root / "away", path)
    VectorIndex.open(folder.index)
    assert set(seen) == {whole[folder.index / "shard-000.faiss"]}


def test_an_index_that_is_replaced_while_it_is_opened_is_opened_again(
    committed: Committed, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, log = committed(unit(9))
    build_index(folder, {0: log.commits[0]}, job="mine", provenance=provenance)
    load = IndexShard.load
    turns = iter([lambda: build_index(folder, log.commits, job="mine", provenance=provenance), lambda: None])

    def load_late(*args: Any) -> IndexShard:
        next(turns)()
        return load(*args)

    monkeypatch.setattr(IndexShard, "load", load_late)
    assert VectorIndex.open(folder.index).manifest.num_vectors == 9


def test_faisss_deserialization_limits_are_set_while_it_reads(
    committed: Committed, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, log = committed(unit(9))
    build_index(folder, log.commits, job="mine", provenance=provenance)
    before = faiss.get_deserialization_vector_byte_limit()
    seen: list[int] = []
    read_index = faiss.read_index

    def spy(path: str) -> Any:
        seen.append(faiss.get_deserialization_vector_byte_limit())
        return read_index(path)

    monkeypatch.setattr(faiss, "read_index", spy)
    VectorIndex.open(folder.index)
    assert 0 < seen[0] < 1 << 22
    assert faiss.get_deserialization_vector_byte_limit() == before


def test_an_open_index_answers_as_before_when_another_takes_its_place(
    committed: Committed, provenance: Provenance
) -> None:
    """The map of rows is read when it is asked for: it must be the one that was there."""
    vectors = unit(9)
    folder, log = committed(vectors)
    build_index(folder, log.commits, job="mine", provenance=provenance)
    index = VectorIndex.open(folder.index)
    build_index(folder, {1: log.commits[1]}, job="yours", provenance=provenance)
    (hits,) = index.search(vectors[0], 9)
    assert [hit.place.row for hit in hits] == [hit.vector for hit in hits]
    assert {hit.place.job for hit in hits} == {"mine"}
