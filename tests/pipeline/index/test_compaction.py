"""Indexes whose deleted vectors are left out: the same answers under the same numbers, in less space."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

import pipeline.index.shard_build
from pipeline.audit import audit
from pipeline.durable import seal
from pipeline.errors import JobError
from pipeline.index.build import index_is_current
from pipeline.index.builders import ThreadBuilders
from pipeline.index.check import IndexedParts
from pipeline.index.compaction import compact, planned_ranges
from pipeline.index.deletions import write_deleted
from pipeline.index.manifest import IndexManifest, read_manifest
from pipeline.index.merging import merge_indexes
from pipeline.index.rebuilding import kept_changes
from pipeline.index.search import VectorIndex
from pipeline.index.shard_build import ShardResult, ShardTask
from pipeline.index.versions import change_index
from pipeline.job_folder import JobFolder
from tests.pipeline.index.indexed_job import KINDS, Make, all_found, assert_whole, unit


@pytest.mark.parametrize("kind", KINDS)
def test_a_compacted_index_answers_as_before_under_the_same_numbers(job: Make, tmp_path: Path, kind: str) -> None:
    one = job("one", unit(80, seed=1), kind=kind, recall=0.1, shards=2)
    two, three = (job(f"of {count}", unit(count, seed=count), kind=kind, recall=0.1) for count in (20, 12))
    one.add(two)
    one.add(three)
    gone = {0, *range(3, 30, 2), 41, *range(80, 95), 111}
    one.delete(*gone)
    before = VectorIndex.open(one.folder.index)
    size_bytes = read_manifest(one.folder.index).shards[0].size_bytes
    standing = set(range(112)) - gone
    assert all_found(before) == standing
    manifest = one.compact([two, three])
    assert (manifest.num_vectors, manifest.num_deleted, manifest.num_absent) == (112, len(gone), len(gone))
    assert [(shard.first_vector, shard.num_vectors, shard.num_held) for shard in manifest.shards] == [
        (0, 40, 25),
        (40, 40, 39),
        (80, 32, 16),  # two shards that were added, joined
    ]
    assert kind != "HNSW8" or manifest.shards[0].size_bytes < size_bytes * 0.8
    assert sorted(path.name for path in one.folder.index.glob("*.faiss")) == [f"shard-00{n}.faiss" for n in range(3)]
    after = VectorIndex.open(one.folder.index)
    assert all_found(after) == standing
    queries = unit(9, seed=3)
    if kind == "Flat":
        assert after.search(queries, 7) == before.search(queries, 7)
    allowed = np.zeros(112, np.bool_)
    allowed[[0, 1, 2, 3, 60, 61, 95, 96, 111]] = True
    for hits in after.search(queries, 20, allowed=allowed):
        assert {hit.vector for hit in hits} == {1, 2, 60, 61, 95, 96}
        assert all(hit.place.row == (hit.vector if hit.vector < 80 else hit.vector - 80) for hit in hits)
    index: Any = faiss.read_index(str(one.folder.index / "shard-002.faiss"))
    assert (index.ntotal, set(index.search(queries, 16)[1].ravel()) - {-1} <= {*range(95, 111)}) == (16, True)
    assert_whole(one.folder)

    # It goes on as an index does: more deleted, added, merged, built again.
    one.delete(1, 96)
    assert all_found(VectorIndex.open(one.folder.index)) == standing - {1, 96}
    one.add(job("four", unit(9, seed=5), kind=kind, recall=0.1))
    standing = standing - {1, 96} | set(range(112, 121))
    assert all_found(VectorIndex.open(one.folder.index)) == standing
    assert_whole(one.folder)
    five = job("five", unit(30, seed=6), kind=kind, recall=0.1)
    for order in ((one, five), (five, one)):
        merged = JobFolder(tmp_path / f"merged-{order[0].name}")
        manifest = merge_indexes(merged, [each.folder for each in order])
        assert (manifest.num_vectors, manifest.num_deleted, manifest.num_absent) == (151, len(gone) + 2, len(gone))
        assert_whole(merged)
        assert len(all_found(VectorIndex.open(merged.index))) == len(standing) + 30
    one.build(change=kept_changes(one.folder))
    assert all_found(VectorIndex.open(one.folder.index)) == standing
    assert_whole(one.folder)


def test_a_job_of_which_nothing_is_left_takes_no_space_and_is_not_read(job: Make) -> None:
    for kind in ("Flat", "HNSW8", "IVF4,Flat"):
        one = job(f"one {kind}", unit(40, seed=1), kind=kind, recall=0.1)
        two = job(f"two {kind}", unit(20, seed=2), kind=kind, recall=0.1)
        one.add(two)
        one.delete(*range(40))
        parts = [IndexedParts(one.folder, None), IndexedParts(two.folder, two.log.commits)]
        manifest = change_index(one.folder, lambda draft, before, parts=parts: compact(draft, before, parts))
        assert [shard.num_held for shard in manifest.shards] == [0, 20]
        assert all_found(VectorIndex.open(one.folder.index)) == {*range(40, 60)}
        one.delete(*range(40, 60))
        parts[1] = IndexedParts(two.folder, None)
        change_index(one.folder, lambda draft, before, parts=parts: compact(draft, before, parts))
        assert one.found(unit(1, seed=3), 100) == [[]]


def test_what_holds_nothing_deleted_is_left_as_it_is(job: Make) -> None:
    one = job("one", unit(60, seed=1), shards=3)
    assert all(part.kept for part in planned_ranges(read_manifest(one.folder.index), None, memory_bytes=1 << 28))
    one.delete(25)
    before = [os.stat(one.folder.index / f"shard-00{n}.faiss").st_ino for n in range(3)]
    one.compact()
    after = [os.stat(one.folder.index / f"shard-00{n}.faiss").st_ino for n in range(3)]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert index_is_current(one.folder, one.log.commits, **one.arguments), "a job that is done does nothing"


def test_the_largest_shard_says_how_many_are_built_side_by_side(job: Make) -> None:
    one, two = (job(f"of {count}", unit(count, seed=1), kind="HNSW8", recall=0.1) for count in (1000, 60))
    one.add(two)
    one.delete(0, 1000)
    asked = list[int]()

    def builders(tasks: Sequence[ShardTask], *, side_by_side: int) -> list[ShardResult]:
        asked.append(side_by_side)
        return ThreadBuilders(1)(tasks, side_by_side=side_by_side)

    one.compact([two], memory_bytes=(24 << 20) + 300_000, builders=builders)  # one of 1,000 fits, two don't
    assert asked == [1]


def test_a_compacted_index_that_misses_its_recall_is_refused_and_left(
    job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = job("one", unit(60, seed=1), kind="SQ8", recall=0.5)
    one.delete(*range(20))
    before = read_manifest(one.folder.index)
    monkeypatch.setattr(pipeline.index.shard_build, "recall_of", lambda found, exact: (0.4, 10))
    with pytest.raises(JobError, match=r"would be found with a recall of 0\.400, and promises 0\.5"):
        one.compact()
    assert read_manifest(one.folder.index) == before
    assert not list(one.folder.attempts.iterdir())


def test_a_shard_that_lacks_what_was_not_deleted_is_refused(job: Make) -> None:
    one = job("one", unit(60, seed=1))
    one.delete(7, 9)
    one.compact()
    manifest = read_manifest(one.folder.index)
    deleted = write_deleted(one.folder.index / "other.parquet", np.array([8, 9]))
    write_manifest_over(one.folder, dataclasses.replace(manifest, deleted=deleted))
    with pytest.raises(JobError, match="it lacks vector 7, which was not deleted"):
        VectorIndex.open(one.folder.index)
    assert any("it lacks vector 7" in problem for problem in audit(one.folder.root).problems)


def write_manifest_over(folder: JobFolder, manifest: IndexManifest) -> None:
    (folder.index / "index.json").write_bytes(seal(manifest.to_json()))
