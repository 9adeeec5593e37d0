"""An index that grows, loses rows and is merged: what it answers, who is not disturbed, and where a crash leaves it."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

import pipeline.index.shard_build
from pipeline.audit import audit
from pipeline.commits import CommitLog
from pipeline.durable import seal
from pipeline.errors import JobError, UserError
from pipeline.index.build import build_index, index_is_current
from pipeline.index.check import IndexedParts
from pipeline.index.compaction import compact, planned_ranges
from pipeline.index.deletions import delete_vectors, write_deleted
from pipeline.index.expression import Filter
from pipeline.index.growth import Addition, add_job
from pipeline.index.manifest import IndexManifest, Provenance, read_manifest
from pipeline.index.matching import matching_vectors
from pipeline.index.merging import merge_indexes
from pipeline.index.rebuilding import kept_changes
from pipeline.index.search import IndexShard, VectorIndex
from pipeline.index.versions import change_index, folder_of_version
from pipeline.indexed_jobs import IndexedRows, job_folder
from pipeline.job_folder import JobFolder, write_job, write_plan
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout

KINDS = ["Flat", "SQ8", "IVF4,Flat", "HNSW8", "PCA7,SQ8", "PCA7,IVF4,Flat", "SQ8,RFlat", "PCA7,HNSW8"]
SPLIT_ROWS = 32

Matrix = npt.NDArray[np.float32]


def unit(num_vectors: int, *, seed: int, dimension: int = 8) -> Matrix:
    vectors = np.random.default_rng(seed).normal(size=(num_vectors, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Job:
    folder: JobFolder
    log: CommitLog
    name: str
    vectors: Matrix
    arguments: Mapping[str, Any]

    def build(self, **changes: Any) -> IndexManifest:
        return build_index(self.folder, self.log.commits, **{**self.arguments, **changes})

    def add(self, other: Job, *, provenance: Provenance | None = None) -> IndexManifest:
        addition = Addition(
            folder=other.folder,
            path=os.path.relpath(other.folder.root, self.folder.root),
            job=other.name,
            commits=other.log.commits,
            provenance=provenance or other.arguments["provenance"],
        )
        return change_index(self.folder, lambda draft, manifest: add_job(draft, manifest, addition))

    def delete(self, *numbers: int) -> IndexManifest:
        gone = np.array(numbers, np.int64)
        return change_index(self.folder, lambda draft, manifest: delete_vectors(draft, manifest, gone))

    def compact(self, others: Sequence[Job] = (), **options: Any) -> IndexManifest:
        parts = [IndexedParts(job.folder, job.log.commits) for job in (self, *others)]
        return change_index(self.folder, lambda draft, manifest: compact(draft, manifest, parts, **options))

    def found(self, queries: Matrix, k: int = 5) -> list[list[tuple[str, int]]]:
        return found_in(self.folder, queries, k)


def found_in(folder: JobFolder, queries: Matrix, k: int = 5) -> list[list[tuple[str, int]]]:
    hits = VectorIndex.open(folder.index).search(queries, k)
    return [[(hit.place.job, hit.place.row) for hit in one] for one in hits]


@pytest.fixture
def job(tmp_path: Path, provenance: Provenance) -> Callable[..., Job]:
    """`job(name, vectors)` -> a finished job that embeds prompts and carries `key`, indexed as `build` is told."""

    def make(
        name: str, vectors: Matrix, *, center: bool = False, keys: list[Any] | None = None, **arguments: Any
    ) -> Job:
        folder = JobFolder(tmp_path / name)
        log = CommitLog(folder, fingerprint=f"of {name}")
        log.recover()
        carried = pa.record_batch({"key": keys or [f"{name}-{row}" for row in range(len(vectors))]})
        layout = RecordLayout.of(samples=0, embeds="prompt", dimension=vectors.shape[1], carried=carried.schema)
        splits = []
        for split, first in enumerate(range(0, len(vectors), SPLIT_ROWS)):
            count = min(SPLIT_ROWS, len(vectors) - first)
            splits.append({"index": split, "first_row": first, "num_rows": count})
            builder = PartBuilder(layout, split=split, first_row=first, num_rows=count)
            builder.carry(first, carried.slice(first, count))
            for row in range(first, first + count):
                builder.add_vector(row, "prompt", vectors[row], prompt_tokens=1)
            log.publish(log.commit(builder.write(folder)))
        spec = {
            "output": {"columns": ["key"]},
            "generate": None,
            "embed": {"template": None},
            "prompt": {"template": None, "column": "key"},
            "index": {},
        }
        write_job(folder, fingerprint=f"of {name}", document={"spec": spec})
        write_plan(folder, fingerprint=f"of {name}", splits=splits, document={})
        made = Job(folder, log, name, vectors, {"job": name, "provenance": provenance, "center": center, **arguments})
        made.build()
        return made

    return make


Make = Callable[..., Job]


def assert_whole(folder: JobFolder) -> None:
    found = audit(folder.root)
    assert (found.problems, found.pending) == ((), ())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_added_and_deleted_are_found_and_not_found(job: Make, kind: str) -> None:
    one = job("one", unit(60, seed=1), kind=kind, recall=0.1)
    two = job("two", unit(20, seed=2), kind="Flat")
    before = {path.name: path.read_bytes() for path in one.folder.index.glob("*.faiss")}
    manifest = one.add(two)
    assert (manifest.version, manifest.num_vectors, [one.job for one in manifest.jobs]) == (2, 80, ["one", "two"])
    assert {name: (one.folder.index / name).read_bytes() for name in before} == before, "nothing was built again"
    k = 1 if kind == "Flat" else 30  # what is kept of a vector is near it, and not itself
    assert all(("two", row) in hits for row, hits in enumerate(one.found(two.vectors, k)))
    assert all(("one", row) in hits for row, hits in enumerate(one.found(one.vectors, k)))
    assert_whole(one.folder)

    manifest = one.delete(3, 65)
    assert (manifest.version, manifest.num_deleted) == (3, 2)
    every = one.found(unit(3, seed=3), k=100)
    assert [len(hits) for hits in every] == [78] * 3
    assert not {("one", 3), ("two", 5)} & {hit for hits in every for hit in hits}
    assert one.delete(0).num_deleted == 3
    assert_whole(one.folder)


def test_a_grown_flat_index_answers_as_one_that_was_built_of_all(job: Make) -> None:
    one, two = job("one", unit(40, seed=1), shards=2), job("two", unit(30, seed=2))
    both = job("both", np.concatenate([one.vectors, two.vectors]))
    one.add(two)
    queries = unit(10, seed=3)
    grown = VectorIndex.open(one.folder.index).search(queries, 20)
    built = VectorIndex.open(both.folder.index).search(queries, 20)
    assert [[(hit.vector, hit.score) for hit in hits] for hits in grown] == [
        [(hit.vector, hit.score) for hit in hits] for hits in built
    ]


def test_what_is_added_is_centred_on_the_first_mean(job: Make) -> None:
    one = job("one", unit(40, seed=1) + 0.5, center=True)
    two = job("two", unit(30, seed=2) - 0.5)
    center = (one.folder.index / "center.npy").read_bytes()
    manifest = one.add(two)
    assert (one.folder.index / "center.npy").read_bytes() == center
    assert manifest.center is not None
    assert_whole(one.folder)


def test_files_can_be_read_with_faiss_alone_under_their_numbers(job: Make) -> None:
    one, two = job("one", unit(10, seed=1)), job("two", unit(7, seed=2))
    manifest = one.add(two)
    assert [(shard.first_vector, shard.num_vectors) for shard in manifest.shards] == [(0, 10), (10, 7)]
    index = faiss.read_index(str(one.folder.index / manifest.shards[1].file))
    np.testing.assert_array_equal(index.reconstruct(13), two.vectors[3])


def test_records_are_read_from_the_job_that_a_hit_is_of(job: Make) -> None:
    one, two = job("one", unit(10, seed=1)), job("two", unit(7, seed=2))
    manifest = one.add(two)
    (hits,) = VectorIndex.open(one.folder.index).search(two.vectors[3], 1)
    rows = IndexedRows(one.folder.root, manifest)
    assert rows.read([hits[0].place])[hits[0].place.record].columns == {"key": "two-3"}
    two.folder.root.rename(two.folder.root.with_name("elsewhere"))
    with pytest.raises(JobError, match=r"the rows of job 'two' are in .*two, and there is no job directory there"):
        IndexedRows(one.folder.root, manifest).read([hits[0].place])
    assert any("the rows of job 'two'" in problem for problem in audit(one.folder.root).problems)


def test_what_can_not_be_compared_or_is_there_is_refused_and_nothing_changes(job: Make, provenance: Provenance) -> None:
    one, two = job("one", unit(10, seed=1)), job("two", unit(7, seed=2))
    before = read_manifest(one.folder.index)
    for changed, expected in (
        (dataclasses.replace(provenance, pooling="last"), r"another pooling \(mean there, last here\)"),
        (dataclasses.replace(provenance, model_files={"model.safetensors": "cc"}), "model_files"),
    ):
        with pytest.raises(UserError, match=expected):
            one.add(two, provenance=changed)
    with pytest.raises(UserError, match="is in the index already, as 'one'"):
        one.add(one)
    assert read_manifest(one.folder.index) == before
    assert not list(one.folder.attempts.iterdir())


def test_a_job_is_added_anew_once_its_rows_are_deleted(job: Make) -> None:
    one, two = job("one", unit(10, seed=1)), job("two", unit(7, seed=2))
    one.add(two)
    with pytest.raises(UserError, match="index delete OUT --filter \"job == 'two'\""):
        one.add(two)
    one.delete(*range(10, 17))
    manifest = one.add(two)
    assert [entry.job for entry in manifest.jobs] == ["one", "two", "two-2"]
    assert one.found(two.vectors[:1], 1) == [[("two-2", 0)]]
    assert_whole(one.folder)


def test_a_reader_of_the_old_version_is_not_disturbed(job: Make) -> None:
    one, two = job("one", unit(30, seed=1)), job("two", unit(7, seed=2))
    queries = unit(5, seed=3)
    reader, manifest = VectorIndex.open(one.folder.index), read_manifest(one.folder.index)
    expected = reader.search(queries, 10)
    one.add(two)
    assert reader.search(queries, 10) == expected
    # One that comes back for a file, as a replaced worker does, finds that of its version.
    folder = folder_of_version(one.folder.index, manifest)
    assert folder == one.folder.root / "index-versions" / "000001"
    assert read_manifest(folder) == manifest
    assert IndexShard.load(folder, manifest, 0).num_vectors == 30
    one.delete(0)
    assert reader.search(queries, 10) == expected
    assert [path.name for path in (one.folder.root / "index-versions").iterdir()] == ["000002"]
    manifest = read_manifest(one.folder.index)
    one.build(kind="SQ8", recall=0.5, change=kept_changes(one.folder))
    folder = folder_of_version(one.folder.index, manifest)
    assert folder.name == "000003"
    assert [IndexShard.load(folder, manifest, number).num_vectors for number in range(2)] == [30, 7]


def test_unchanged_files_are_not_copied(job: Make) -> None:
    one = job("one", unit(30, seed=1))
    before = os.stat(one.folder.index / "shard-000.faiss").st_ino
    one.delete(0)
    assert os.stat(one.folder.index / "shard-000.faiss").st_ino == before


@pytest.mark.parametrize("change", ["add", "delete", "rebuild", "compact"])
def test_a_crash_at_any_step_leaves_the_old_version_or_the_new(job: Make, filesystem: Any, change: str) -> None:
    one, two = job("one", unit(20, seed=1)), job("two", unit(7, seed=2))
    one.delete(4)
    old = read_manifest(one.folder.index)
    work = {
        "add": lambda: one.add(two),
        "delete": lambda: one.delete(2),
        "compact": one.compact,
        "rebuild": lambda: one.build(change=kept_changes(one.folder)),
    }[change]
    with filesystem.dies_at(None):
        work()
    num_steps = len(filesystem.trace)
    assert num_steps > 5
    new = read_manifest(one.folder.index)
    for step in range(num_steps):
        one.build()
        change_index(one.folder, lambda draft, manifest: delete_vectors(draft, manifest, np.array([4])))
        assert read_manifest(one.folder.index).jobs == old.jobs
        with filesystem.dies_at(step):
            work()
        assert filesystem.died
        manifest = read_manifest(one.folder.index)
        expected = old if manifest.version == 2 else new
        assert (manifest.jobs, manifest.num_deleted) == (expected.jobs, expected.num_deleted)
        assert manifest.num_absent == expected.num_absent
        every = one.found(unit(1, seed=3), 100)[0]
        assert ("one", 4) not in every
        assert len(every) == manifest.num_vectors - manifest.num_deleted
        one.log.recover()
        assert_whole(one.folder)
        if manifest.version == 2:
            work()
            assert read_manifest(one.folder.index).num_deleted == new.num_deleted
            assert read_manifest(one.folder.index).num_absent == new.num_absent


def test_a_job_that_is_indexed_again_keeps_what_was_added_and_deleted(job: Make) -> None:
    one, two = job("one", unit(40, seed=1)), job("two", unit(7, seed=2))
    one.add(two)
    one.delete(4, 42)
    assert index_is_current(one.folder, one.log.commits, **one.arguments), "adding and deleting is no reason to build"
    assert not index_is_current(one.folder, {0: one.log.commits[0]}, **one.arguments)
    manifest = one.build(kind="SQ8", recall=0.5, change=kept_changes(one.folder))
    assert (manifest.version, manifest.num_vectors, manifest.num_deleted) == (4, 47, 2)
    every = {hit for hits in one.found(unit(1, seed=3), 100) for hit in hits}
    assert every == {("one", row) for row in range(40) if row != 4} | {("two", row) for row in range(7) if row != 2}
    assert_whole(one.folder)


def test_what_was_deleted_stays_deleted_when_all_is_indexed_again(job: Make, tmp_path: Path) -> None:
    one, two, three = (job(name, unit(20, seed=number)) for number, name in enumerate(("one", "two", "three")))
    one.add(two)
    one.delete(4, *range(20, 40))
    one.add(two)  # anew, now that its rows are deleted
    one.delete(42)
    one.add(three)
    one.delete(*range(60, 80))
    three.folder.root.rename(tmp_path / "elsewhere")  # nobody needs it any more
    one.build(job="renamed", change=kept_changes(one.folder))
    every = {hit for hits in one.found(unit(1, seed=3), 100) for hit in hits}
    assert every == {("renamed", row) for row in range(20) if row != 4} | {
        ("two-2", row) for row in range(20) if row != 2
    }
    assert_whole(one.folder)


def test_a_filter_means_the_same_in_jobs_whose_columns_are_of_other_types(job: Make, tmp_path: Path) -> None:
    one = job("one", unit(4, seed=1), keys=[1, 2, 3, 4])
    two = job("two", unit(4, seed=2), keys=[0.5, 1.5, 2.5, 3.5])
    three = job("three", unit(4, seed=3), keys=["1", "2", "3", "4"])
    one.add(two)

    def found(text: str) -> list[int]:
        manifest = read_manifest(one.folder.index)
        mask = matching_vectors(
            one.folder.index, manifest, Filter.parse(text), lambda entry: job_folder(one.folder.root, entry)
        )
        return np.flatnonzero(mask).tolist()

    assert found("key > 2") == [2, 3, 6, 7]
    assert found("key in (2, 2.5)") == [1, 6]
    one.add(three)
    with pytest.raises(UserError, match="column 'key' is of type double in one of the index's jobs and of type string"):
        found("key > 2")
    one.delete(*range(8, 12))
    three.folder.root.rename(tmp_path / "elsewhere")
    assert found("key > 2") == [2, 3, 6, 7], "nobody misses a job of which nothing is left"


def test_a_damaged_list_of_deletions_is_never_read_as_none(job: Make) -> None:
    one = job("one", unit(20, seed=1))
    one.delete(4)
    (one.folder.index / "deleted.parquet").write_bytes(b"")
    with pytest.raises(JobError, match="damaged"):
        VectorIndex.open(one.folder.index)
    with pytest.raises(JobError, match="damaged"):
        kept_changes(one.folder)
    assert any("deleted.parquet" in problem for problem in audit(one.folder.root).problems)


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


def all_found(index: VectorIndex) -> set[int]:
    """Every vector that can be found: among half of them an approximate kind looks until it has found all."""
    even = np.arange(index.manifest.num_vectors) % 2 == 0
    query = unit(1, seed=3)
    return {hit.vector for half in (even, ~even) for hit in index.search(query, 500, allowed=half)[0]}


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


@pytest.mark.parametrize("kind", KINDS)
def test_merged_indexes_answer_as_each_did(job: Make, tmp_path: Path, kind: str) -> None:
    one = job("one", unit(60, seed=1), kind=kind, recall=0.1)
    two = job("two", unit(50, seed=2), kind=kind, recall=0.1, shards=2)
    one.delete(7)
    two.delete(9)
    merged = JobFolder(tmp_path / "merged")
    manifest = merge_indexes(merged, [one.folder, two.folder])
    assert [(entry.job, entry.path) for entry in manifest.jobs] == [("one", "../one"), ("two", "../two")]
    assert (manifest.num_vectors, manifest.num_deleted, len(manifest.shards)) == (110, 2, 3)
    (hits,) = VectorIndex.open(merged.index).search(unit(1, seed=3), 200, allowed=np.ones(110, np.bool_))
    every = [(hit.place.job, hit.place.row) for hit in hits]
    assert len(every) == 108
    assert not {("one", 7), ("two", 9)} & set(every)
    k = 1 if kind == "Flat" else 30
    assert all(("two", row) in hits for row, hits in enumerate(found_in(merged, two.vectors, k)) if row != 9)
    assert_whole(merged)


def test_a_merge_that_dies_at_any_step_leaves_no_index_or_the_whole(job: Make, tmp_path: Path, filesystem: Any) -> None:
    one, two = job("one", unit(20, seed=1)), job("two", unit(7, seed=2))
    one.delete(4)
    sources = [one.folder, two.folder]
    with filesystem.dies_at(None):
        merge_indexes(JobFolder(tmp_path / "merged"), sources)
    num_steps = len(filesystem.trace)
    assert num_steps > 5
    for step in range(num_steps):
        merged = JobFolder(tmp_path / f"merged-{step}")
        with filesystem.dies_at(step):
            merge_indexes(merged, sources)
        assert filesystem.died
        if not merged.index.exists():
            merge_indexes(merged, sources)  # what was left of it is in nobody's way
        assert_whole(merged)
        assert len(found_in(merged, unit(1, seed=3), 100)[0]) == 26
        assert not list(merged.attempts.iterdir())
    assert_whole(one.folder)


def test_storage_that_is_full_leaves_the_version_that_was_there(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (
        job("one", unit(40, seed=1), kind="HNSW8", recall=0.1),
        job("two", unit(20, seed=2), kind="HNSW8", recall=0.1),
    )
    one.delete(3)
    before = read_manifest(one.folder.index)
    files = {path.name: path.read_bytes() for path in one.folder.index.iterdir()}
    write = os.write

    def full_after(num_bytes: int) -> Any:
        left = [num_bytes]

        def limited(handle: int, content: Any) -> int:
            left[0] -= len(content)
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "no space left on device")
            return write(handle, content)

        return limited

    for work in (lambda: one.add(two), lambda: one.delete(7), one.compact, one.build):
        for num_bytes in (0, 300, 1200):
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", full_after(num_bytes))
                with pytest.raises(JobError, match="no space left; free some and run again"):
                    work()
            assert read_manifest(one.folder.index) == before
            assert {path.name: path.read_bytes() for path in one.folder.index.iterdir()} == files
            assert not list(one.folder.attempts.iterdir())


def test_indexes_that_do_not_belong_together_are_not_merged(job: Make, tmp_path: Path, provenance: Provenance) -> None:
    one, two, other = (job(name, unit(20, seed=number)) for number, name in enumerate(("one", "two", "other")))
    out = JobFolder(tmp_path / "merged")
    one.add(two)
    with pytest.raises(UserError, match="two is in the index already, as 'two'"):
        merge_indexes(out, [one.folder, two.folder])
    other.build(provenance=dataclasses.replace(provenance, tokenizer="cc"))
    with pytest.raises(UserError, match=r"can't be merged with .*one: its vectors were made with another tokenizer"):
        merge_indexes(out, [one.folder, other.folder])
    other.build(kind="SQ8", recall=0.1)
    with pytest.raises(UserError, match=r"give both the same index\.kind"):
        merge_indexes(out, [one.folder, other.folder])
    other.build(center=True)
    with pytest.raises(UserError, match="centred on different means"):
        merge_indexes(out, [one.folder, other.folder])
    other.build()
    with pytest.raises(UserError, match="is not empty"):
        merge_indexes(two.folder, [one.folder, other.folder])
    assert not out.index.exists()
    other.build(recall=0.5)
    manifest = merge_indexes(out, [one.folder, other.folder])
    assert manifest.recall.target == 0.5, "what both have promised"
    assert_whole(out)
