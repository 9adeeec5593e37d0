"""Recall is measured against a brute force, tuned to its target, and a kind that misses it makes no index."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from pipeline.commits import CommitLog
from pipeline.errors import JobError
from pipeline.index import faiss_files, kinds, recall
from pipeline.index.build import build_index, index_is_current
from pipeline.index.manifest import Provenance, read_manifest
from pipeline.index.recall import ExactSearch, Found, Queries, merged, query_numbers, recall_of
from pipeline.index.search import VectorIndex
from pipeline.job_folder import JobFolder

Committed = Callable[..., tuple[JobFolder, CommitLog]]


def clustered(num_vectors: int, dimension: int = 16, *, seed: int = 0) -> npt.NDArray[np.float32]:
    chance = np.random.default_rng(seed)
    centres = chance.normal(size=(12, dimension))
    vectors = centres[chance.integers(0, 12, num_vectors)] + 0.7 * chance.normal(size=(num_vectors, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def true_neighbours(vectors: npt.NDArray[np.float32], number: int) -> list[int]:
    scores = vectors.astype(np.float64) @ vectors[number].astype(np.float64)
    scores[number] = -np.inf
    return np.argsort(-scores, kind="stable")[:10].tolist()


@pytest.mark.parametrize("kind", ["IVF16,Flat", "HNSW4", "IVF16,SQ8"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_stored_recall_is_what_a_search_of_the_finished_index_finds(
    committed: Committed, provenance: Provenance, kind: str, shards: int
) -> None:
    vectors = clustered(600)
    folder, log = committed(vectors)
    manifest = build_index(folder, log.commits, job="mine", provenance=provenance, kind=kind, shards=shards)
    index = VectorIndex.open(folder.index)
    asked = query_numbers(600)
    assert manifest.recall.num_queries == len(asked) == 150
    hits = 0
    for number, found in zip(asked.tolist(), index.search(vectors[asked], 11), strict=True):
        others = [hit.vector for hit in found if hit.vector != number][:10]
        hits += len(set(others) & set(true_neighbours(vectors, number)))
    assert manifest.recall.reached == pytest.approx(hits / 1500, abs=0.002)
    assert 0.95 <= manifest.recall.reached < 1.01
    for shard in manifest.shards:
        assert shard.effort is not None
        assert shard.recall == shard.trials[-1].recall >= 0.95
        assert shard.effort == shard.trials[-1].effort
        assert all(trial.recall < 0.95 for trial in shard.trials[:-1])
    assert read_manifest(folder.index) == manifest


def test_more_recall_costs_more_effort_and_none_costs_the_least(committed: Committed, provenance: Provenance) -> None:
    folder, log = committed(clustered(600))

    def effort(target: float) -> Any:
        made: dict[str, Any] = {"job": "mine", "provenance": provenance, "kind": "IVF16,Flat", "recall": target}
        manifest = build_index(folder, log.commits, **made)
        assert index_is_current(folder, log.commits, **made)
        assert not index_is_current(folder, log.commits, **{**made, "recall": 0.5})
        return manifest.shards[0].effort

    assert effort(0) == 1
    assert 1 < effort(0.9) < effort(1) <= 16


def test_queries_are_not_trained_on(
    committed: Committed, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = clustered(400)
    folder, log = committed(vectors)
    seen: list[npt.NDArray[np.float32]] = []
    monkeypatch.setattr(faiss_files, "train", lambda index, sample, kind: (seen.append(sample), index.train(sample)))
    build_index(folder, log.commits, job="mine", provenance=provenance, kind="IVF4,Flat")
    trained = {vector.tobytes() for vector in seen[0]}
    assert trained == {vector.tobytes() for vector in np.delete(vectors, query_numbers(400), axis=0)}


def test_exact_search_in_pieces_is_the_brute_force_without_the_query_itself() -> None:
    vectors = clustered(300)
    queries = Queries(numbers=np.array([3, 250]), matrix=vectors[[3, 250]])
    pieces = []
    for start, stop in ((0, 100), (100, 300)):
        search = ExactSearch(queries)
        for place in range(start, stop, 37):
            numbers = np.arange(place, min(place + 37, stop))
            search.add(vectors[numbers], numbers)
        pieces.append(search.found)
    exact = merged(pieces, recall.KEPT)
    assert [numbers[:10].tolist() for numbers in exact.numbers] == [true_neighbours(vectors, n) for n in (3, 250)]


def found(numbers: list[list[int]], scores: list[list[float]]) -> Found:
    return Found(scores=np.array(scores), numbers=np.array(numbers))


def test_any_of_the_vectors_that_score_as_the_last_does_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "K", 2)
    monkeypatch.setattr(recall, "KEPT", 4)
    exact = found([[1, 2, 3, 4]], [[0.9, 0.5, 0.5, 0.1]])
    assert recall_of(found([[1, 3]], [[0.9, 0.5]]), exact) == (1.0, 1)
    assert recall_of(found([[1, 4]], [[0.9, 0.1]]), exact) == (0.5, 1)
    assert recall_of(found([[1, -1]], [[0.9, -np.inf]]), exact) == (0.5, 1)
    alike = found([[1, 2, 3, 4], [1, 2, 3, 4]], [[0.9, 0.5, 0.5, 0.1], [0.9, 0.9, 0.9, 0.9]])
    assert recall_of(found([[1, 2], [7, 8]], [[0.9, 0.5], [0.9, 0.9]]), alike) == (1.0, 1)
    assert recall_of(found([[7, 8]], [[0.9, 0.9]]), found([[1, 2, 3, 4]], [[0.9] * 4])) == (None, 0)


def test_recall_counts_what_each_query_found_of_its_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "K", 3)
    monkeypatch.setattr(recall, "KEPT", 6)
    chance = np.random.default_rng(0)
    numbers = np.stack([chance.permutation(20)[:6] for _ in range(50)])
    numbers[:10, 2:] = -1  # in a small shard there may be fewer than K
    scores = np.where(numbers >= 0, -np.arange(6.0), -np.inf)
    guesses = np.stack([chance.permutation(20)[:3] for _ in range(50)])
    guesses[::4, 1:] = -1
    hits = [len(set(numbers[q, :3].tolist()) & set(guesses[q].tolist()) - {-1}) for q in range(50)]
    expected = sum(hits) / (10 * 2 + 40 * 3), 50
    assert recall_of(Found(scores=np.zeros((50, 3)), numbers=guesses), Found(scores=scores, numbers=numbers)) == (
        pytest.approx(expected[0], abs=1e-6),
        expected[1],
    )


@pytest.mark.parametrize("kind", ["IVF2,Flat", "HNSW4", "SQ8"])
@pytest.mark.parametrize("num_vectors", [2, 3, 4, 9])
def test_few_vectors_and_vectors_that_are_all_alike_make_an_index_too(
    committed: Committed, provenance: Provenance, kind: str, num_vectors: int
) -> None:
    folder, log = committed(clustered(num_vectors))
    manifest = build_index(folder, log.commits, job="mine", provenance=provenance, kind=kind, recall=0.5)
    assert manifest.recall.num_queries == num_vectors // 4
    alike = np.repeat(clustered(1), 90, axis=0)
    folder, log = committed(alike, name="alike")
    manifest = build_index(folder, log.commits, job="mine", provenance=provenance, kind=kind)
    assert manifest.recall.reached is None
    assert len(VectorIndex.open(folder.index).search(alike[0], 5)[0]) == 5


def test_a_kind_that_misses_its_recall_makes_no_index_and_says_how_to_mend(
    committed: Committed, provenance: Provenance
) -> None:
    folder, log = committed(clustered(600))
    with pytest.raises(
        JobError, match=r"index\.recall 0\.95 is missed: IVF4,PQ4x4 reaches 0\.\d+ at nprobe 4;"
    ) as caught:
        build_index(folder, log.commits, job="mine", provenance=provenance, kind="IVF4,PQ4x4", shards=2)
    assert "\n" not in str(caught.value)
    assert not folder.index.exists()
    assert os.listdir(folder.attempts) == []
    assert folder.part(0).exists()
    manifest = build_index(folder, log.commits, job="mine", provenance=provenance, kind="IVF4,PQ4x4", recall=0.1)
    assert manifest.recall.reached is not None
    assert 0.1 <= manifest.recall.reached < 0.95


def test_refinement_finds_what_codes_alone_lose(committed: Committed, provenance: Provenance) -> None:
    folder, log = committed(clustered(600))
    kind = "IVF4,PQ4x4,RFlat"
    manifest = build_index(folder, log.commits, job="mine", provenance=provenance, kind=kind, recall=0.8)
    assert faiss.read_index(str(folder.index / "shard-000.faiss")).k_factor == 8
    assert manifest.recall.reached is not None


def test_auto_goes_on_to_the_next_kind_and_the_index_is_current_then(
    committed: Committed, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "FLAT_VECTORS", 100)
    monkeypatch.setattr(recall, "_LEAST_EF_SEARCH", 1)
    monkeypatch.setattr(recall, "_MOST_EF_SEARCH", 1)
    monkeypatch.setattr(kinds, "_HNSW_LINKS", 2)
    folder, log = committed(clustered(1200))
    made: dict[str, Any] = {"job": "mine", "provenance": provenance, "kind": "auto", "shards": None}
    heard: list[tuple[str, int]] = []
    manifest = build_index(
        folder, log.commits, **made, on_shard=lambda kind, shard, seconds: heard.append((kind, len(seconds)))
    )
    assert [missed.kind for missed in manifest.missed] == ["HNSW2"]
    assert manifest.missed[0].reached < 0.95
    assert manifest.kind == "IVF16,Flat"
    assert heard == [("HNSW2", 1), ("IVF16,Flat", len(manifest.shards[0].trials))]
    assert index_is_current(folder, log.commits, **made)
    assert not index_is_current(folder, log.commits, **{**made, "kind": "HNSW2"})
    assert index_is_current(folder, log.commits, **{**made, "kind": "IVF16,Flat"})


def test_shards_that_are_good_enough_alone_but_not_together_are_searched_harder(
    committed: Committed, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What shards find alone is made to look better than it is."""
    honest = recall.recall_of
    monkeypatch.setattr(recall, "recall_of", lambda found, exact: (1.0, honest(found, exact)[1]))
    folder, log = committed(clustered(600))
    manifest = build_index(folder, log.commits, job="mine", provenance=provenance, kind="IVF16,Flat", shards=2)
    assert manifest.recall.reached is not None
    assert manifest.recall.reached >= 0.95
    assert all(shard.effort is not None and shard.effort > 1 for shard in manifest.shards)
    assert VectorIndex.open(folder.index).manifest == manifest
