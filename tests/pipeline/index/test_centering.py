"""An index whose vectors have lost their mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline.commits import CommitLog
from pipeline.errors import JobError, UserError
from pipeline.index.build import build_index, index_is_current
from pipeline.index.centering import CENTER_NAME, Centering
from pipeline.index.check import IndexedParts, index_problems
from pipeline.index.manifest import Provenance, read_manifest
from pipeline.index.search import VectorIndex, flat_matrix, search_index
from pipeline.job_folder import JobFolder

Committed = Callable[..., tuple[JobFolder, CommitLog]]
ROWS, WIDTH = 40, 8


def cone(seed: int = 0) -> np.ndarray:
    """Unit vectors that are all much alike, as those of a model that was never trained to embed."""
    vectors = np.random.default_rng(seed).normal(size=(ROWS, WIDTH)) + 9
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def centered(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    moved = vectors.astype(np.float64) - mean
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)


@pytest.fixture
def built(committed: Committed, provenance: Provenance) -> tuple[JobFolder, CommitLog, dict[str, Any]]:
    folder, log = committed(cone())
    made = replace(provenance, settings={"centered": True})
    arguments: dict[str, Any] = {"job": "j", "provenance": made, "kind": "Flat", "shards": 2, "center": True}
    build_index(folder, log.commits, **arguments)
    return folder, log, arguments


def test_vectors_and_queries_lose_the_mean_of_the_corpus(built: Any) -> None:
    folder, _, _ = built
    index = VectorIndex.open(folder.index)
    mean = cone().mean(axis=0, dtype=np.float64)
    expected = centered(cone(), mean)
    held = np.concatenate([flat_matrix(shard._index) for shard in index.shards])
    np.testing.assert_allclose(held, expected, atol=1e-6)
    queries = cone(1)[:5]
    for query, hits in zip(centered(queries, mean), index.search(queries, 3), strict=True):
        scores = expected @ query
        assert [hit.vector for hit in hits] == np.argsort(-scores)[:3].tolist()
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores)[::-1][:3], atol=1e-6)
    assert search_index(folder.index, cone()[7] * 5, 1)[0][0].vector == 7, "a row finds itself, of whatever length"


def test_the_index_says_so_and_holds_against_its_parts(built: Any) -> None:
    folder, log, arguments = built
    manifest = read_manifest(folder.index)
    assert manifest.center is not None
    assert (manifest.center.file, manifest.center.num_vectors) == (CENTER_NAME, ROWS)
    assert list(index_problems(folder, manifest, [IndexedParts(folder, log.commits)], parts_are_whole=True)) == []
    assert index_is_current(folder, log.commits, **arguments)
    assert not index_is_current(folder, log.commits, **arguments | {"center": False})


def test_built_twice_it_has_the_same_bytes(built: Any) -> None:
    folder, log, arguments = built
    before = {path.name: path.read_bytes() for path in folder.index.iterdir() if path.name != "rows.parquet"}
    build_index(folder, log.commits, **arguments)
    assert before == {name: (folder.index / name).read_bytes() for name in before}


def test_parts_keep_the_vectors_as_they_were(built: Any) -> None:
    from pipeline.index.vectors import committed_vectors

    folder, log, _ = built
    kept = np.concatenate([batch.matrix for batch in committed_vectors(folder, log.commits)])
    np.testing.assert_array_equal(kept, cone())


@pytest.mark.parametrize("damage", ["changed", "missing", "foreign"])
def test_a_damaged_mean_is_noticed_before_it_is_used(built: Any, damage: str) -> None:
    folder, log, _ = built
    path = folder.index / CENTER_NAME
    if damage == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(b"\x93NUMPY" if damage == "foreign" else bytes(content))
    with pytest.raises(JobError, match=CENTER_NAME):
        VectorIndex.open(folder.index)
    problems = list(
        index_problems(folder, read_manifest(folder.index), [IndexedParts(folder, log.commits)], parts_are_whole=True)
    )
    assert len(problems) == 1
    assert CENTER_NAME in problems[0]


def test_a_row_does_not_depend_on_its_batch() -> None:
    vectors = cone()
    centering = Centering.of([vectors[:7], vectors[7:]], WIDTH)
    whole = centering.apply(vectors)
    alone = np.concatenate([centering.apply(vectors[row : row + 1]) for row in range(ROWS)])
    np.testing.assert_array_equal(whole, alone)


def test_rows_that_are_all_alike_have_no_direction(committed: Committed, provenance: Provenance) -> None:
    folder, log = committed(np.repeat(cone()[:1], 3, axis=0))
    build_index(folder, log.commits, job="j", provenance=provenance, center=True)
    assert [hit.score for hit in search_index(folder.index, cone()[1], 3)[0]] == [0.0] * 3
    with pytest.raises(UserError, match="no direction"):
        search_index(folder.index, cone()[0], 1)


def test_other_kinds_are_trained_on_centred_vectors(committed: Committed, provenance: Provenance) -> None:
    folder, log = committed(cone())
    build_index(folder, log.commits, job="j", provenance=provenance, kind="IVF2,Flat", center=True)
    assert [hits[0].vector for hits in search_index(folder.index, cone(), 1)] == list(range(ROWS))


def test_an_index_without_a_mean_reads_as_before(committed: Committed, provenance: Provenance) -> None:
    folder, log = committed(cone())
    manifest = build_index(folder, log.commits, job="j", provenance=provenance)
    assert manifest.center is None
    document = manifest.to_json()
    del document["center"]
    assert type(manifest).from_json(json.loads(json.dumps(document))) == manifest
