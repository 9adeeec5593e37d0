"""An index that grows and loses rows: what it answers, who is not disturbed, and where a crash leaves it."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from pipeline import durable
from pipeline.audit import audit
from pipeline.durable import seal, unseal
from pipeline.errors import JobError, UserError
from pipeline.index.build import build_index, index_is_current
from pipeline.index.deletions import delete_vectors
from pipeline.index.expression import Filter
from pipeline.index.manifest import Provenance, read_manifest
from pipeline.index.matching import matching_vectors
from pipeline.index.merging import merge_indexes
from pipeline.index.rebuilding import kept_changes
from pipeline.index.search import IndexShard, VectorIndex
from pipeline.index.versions import change_index, folder_of_version, lacks_name, put_back
from pipeline.indexed_jobs import IndexedRows, job_folder
from pipeline.job_folder import JobFolder
from pipeline.lock import lock
from tests.pipeline.index.indexed_job import KINDS, Job, Make, assert_whole, unit


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


def test_a_job_whose_rows_all_failed_is_added_to_and_done(job: Make, committed: Any, provenance: Provenance) -> None:
    folder, log = committed(np.full((9, 8), np.nan, np.float32))
    arguments: dict[str, Any] = {"job": "mine", "provenance": provenance}
    build_index(folder, log.commits, **arguments)
    mine, two = Job(folder, log, "mine", np.empty((0, 8), np.float32), arguments), job("two", unit(7, seed=2))
    mine.add(two)
    assert index_is_current(folder, log.commits, **arguments)
    mine.delete(3)
    mine.compact([two])
    assert index_is_current(folder, log.commits, **arguments)
    assert not index_is_current(folder, log.commits, **arguments | {"recall": 0.5})
    assert len(mine.found(unit(1, seed=3), 20)[0]) == 6


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


def test_an_index_that_is_built_again_of_more_rows_is_its_next_version(job: Make) -> None:
    one = job("one", unit(40, seed=1))
    build_index(one.folder, {0: one.log.commits[0]}, **one.arguments)  # as after a run that a limit cut short
    before = read_manifest(one.folder.index)
    manifest = one.build(change=kept_changes(one.folder))
    assert (before.version, before.num_vectors, manifest.version, manifest.num_vectors) == (1, 32, 2, 40)
    assert [note.change for note in manifest.history] == ["built", "built again, as Flat"]
    kept = folder_of_version(one.folder.index, before)
    assert (kept.name, read_manifest(kept)) == ("000001", before)


def test_unchanged_files_are_not_copied(job: Make) -> None:
    one = job("one", unit(30, seed=1))
    before = os.stat(one.folder.index / "shard-000.faiss").st_ino
    one.delete(0)
    assert os.stat(one.folder.index / "shard-000.faiss").st_ino == before


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("change", ["add", "delete", "rebuild", "compact"])
def test_a_crash_at_any_step_leaves_the_old_version_or_the_new(
    job: Make, filesystem: Any, monkeypatch: pytest.MonkeyPatch, change: str, exchange: bool
) -> None:
    """Where two names can't be exchanged it may leave the old one under another name, until who comes next."""
    if not exchange:
        monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
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
    num_put_back = 0
    for step in range(num_steps):
        one.build()
        change_index(one.folder, lambda draft, manifest: delete_vectors(draft, manifest, np.array([4])))
        assert read_manifest(one.folder.index).jobs == old.jobs
        with filesystem.dies_at(step):
            work()
        assert filesystem.died
        num_put_back += lacks_name(one.folder)
        put_back(one.folder)
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
    assert bool(num_put_back) != exchange


def test_an_index_that_a_crash_left_without_its_name_is_found_by_all_who_ask(
    job: Make, tmp_path: Path, filesystem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    one, two = job("one", unit(20, seed=1)), job("two", unit(7, seed=2))
    merged = JobFolder(tmp_path / "merged")
    merge_indexes(merged, [one.folder, two.folder])

    def die_between_the_names(folder: JobFolder) -> None:
        for step in itertools.count():
            with filesystem.dies_at(step):
                change_index(folder, lambda draft, manifest: delete_vectors(draft, manifest, np.array([3])))
            if lacks_name(folder):
                return

    die_between_the_names(merged)
    assert audit(merged.root).pending == (
        f"the index was being replaced and lies in index-versions/: `gristmill index show {merged.root}` puts it back",
    )
    put_back(merged)
    assert_whole(merged)
    die_between_the_names(one.folder)
    with pytest.raises(JobError, match="in use by"), lock(one.folder):
        put_back(one.folder)
    change_index(one.folder, lambda draft, manifest: delete_vectors(draft, manifest, np.array([5])))
    assert_whole(one.folder)


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


@pytest.mark.parametrize("name", ["shard-000.faiss", "shard-001.faiss", "center.npy"])
def test_a_damaged_file_is_removed_and_built_again_with_what_was_added_and_deleted(job: Make, name: str) -> None:
    one, two = job("one", unit(40, seed=1), center=True), job("two", unit(7, seed=2))
    one.add(two)
    one.delete(4, 42)
    every = sorted(one.found(unit(1, seed=3), 100)[0])
    path = one.folder.index / name
    content = path.read_bytes()
    path.unlink()  # and no other name of it, in index-versions/, is written to
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert any(f"{name} is damaged" in line and "; remove it and run again" in line for line in _problems(one))
    path.unlink()
    assert not index_is_current(one.folder, one.log.commits, **one.arguments)
    one.build(change=kept_changes(one.folder))
    assert sorted(one.found(unit(1, seed=3), 100)[0]) == every
    assert_whole(one.folder)


def _problems(job: Job) -> tuple[str, ...]:
    return audit(job.folder.root).problems


@pytest.mark.parametrize("name", ["index.json", "deleted.parquet", "rows.parquet"])
@pytest.mark.parametrize("damage", ["changed", "removed", "format"])
def test_an_index_is_not_built_again_where_what_was_added_and_deleted_is_not_known(
    job: Make, name: str, damage: str
) -> None:
    one, two = job("one", unit(20, seed=1)), job("two", unit(7, seed=2))
    one.add(two)
    one.delete(4, 22)
    path = one.folder.index / name
    content = path.read_bytes()
    path.unlink()
    if damage == "changed":
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    elif damage == "format" and name == "index.json":
        path.write_bytes(seal({**unseal(content, path), "format": 1}))
    with pytest.raises(JobError) as refused:
        kept_changes(one.folder)
    assert str(path) in str(refused.value)
    assert f"have {one.folder.root / 'index-versions' / '000002'}, the version before, take the" in str(refused.value)
    shutil.rmtree(one.folder.index)
    with pytest.raises(JobError, match=r"index\.json is missing"):
        kept_changes(one.folder)
    (one.folder.root / "index-versions" / "000002").rename(one.folder.index)
    assert index_is_current(one.folder, one.log.commits, **one.arguments)
    one.build(change=kept_changes(one.folder))
    assert len(one.found(unit(1, seed=3), 100)[0]) == 27, "the job that was added is there"
    shutil.rmtree(one.folder.index)
    shutil.rmtree(one.folder.root / "index-versions")
    assert kept_changes(one.folder) is None, "who removes all of it knows"


@pytest.mark.parametrize("change", ["none", "add", "delete"])
def test_an_index_that_can_not_be_read_is_built_again_where_nothing_was_added_or_deleted(
    job: Make, change: str
) -> None:
    one, two = job("one", unit(20, seed=1)), job("two", unit(7, seed=2))
    if change != "none":
        one.add(two) if change == "add" else one.delete(3)
        shutil.rmtree(one.folder.root / "index-versions")
    (one.folder.index / "index.json").write_bytes(b"{")
    if change == "none":
        assert kept_changes(one.folder) is None
        one.build()
        assert_whole(one.folder)
    else:
        with pytest.raises(JobError, match=r"index\.json is missing or can't be read: what was added .* back, or"):
            kept_changes(one.folder)


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
    with pytest.raises(JobError, match=r"deleted\.parquet is missing or can't be read"):
        kept_changes(one.folder)
    assert any("deleted.parquet" in problem for problem in audit(one.folder.root).problems)


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
