"""What is built is plain FAISS and plain Parquet, whole or not at all."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import durable
from pipeline.commits import CommitLog
from pipeline.durable import file_sha256, read_sealed, seal
from pipeline.errors import JobError, UserError
from pipeline.index import row_map
from pipeline.index.build import build_index, index_is_current
from pipeline.index.flat_file import FlatFile
from pipeline.index.manifest import Provenance, read_manifest
from pipeline.index.search import VectorIndex
from pipeline.index.vectors import committed_vectors
from pipeline.job_folder import JobFolder
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout

Committed = Callable[..., tuple[JobFolder, CommitLog]]


def unit(num_vectors: int, dimension: int = 8, *, seed: int = 0) -> npt.NDArray[np.float32]:
    vectors = np.random.default_rng(seed).normal(size=(num_vectors, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("first_vector", [0, 1, 300])
@pytest.mark.parametrize("num_vectors", [0, 1, 5])
def test_a_flat_file_is_byte_for_byte_what_faiss_writes(tmp_path: Path, first_vector: int, num_vectors: int) -> None:
    vectors = unit(num_vectors, 6)
    index: Any = faiss.IndexFlatIP(6)
    if first_vector:
        index = faiss.IndexIDMap2(index)
        index.add_with_ids(vectors, np.arange(first_vector, first_vector + num_vectors))
    else:
        index.add(vectors)
    faiss.write_index(index, str(tmp_path / "theirs"))
    with FlatFile(tmp_path / "ours", dimension=6, first_vector=first_vector, num_vectors=num_vectors) as file:
        file.add(vectors[:2])
        file.add(vectors[2:])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    contents = file.contents()
    assert contents.sha256 == file_sha256(tmp_path / "ours")
    assert contents.size_bytes == (tmp_path / "ours").stat().st_size


@pytest.mark.parametrize("shards", [1, 2, 3, 50])
def test_shards_hold_the_parts_vectors_under_dense_numbers_in_row_order(
    committed: Committed, provenance: Provenance, shards: int
) -> None:
    vectors = unit(24)
    vectors[[3, 20]] = np.nan  # failed rows have no vector and take no number
    folder, log = committed(vectors)
    manifest = build_index(folder, log.commits, job="mine", provenance=provenance, shards=shards)
    kept = np.delete(np.arange(24), [3, 20])
    assert manifest.num_vectors == 22
    assert sum(shard.num_vectors for shard in manifest.shards) == 22
    assert max(s.num_vectors for s in manifest.shards) - min(s.num_vectors for s in manifest.shards) <= 1
    assert len(manifest.shards) == min(shards, 22)
    for shard in manifest.shards:
        index = faiss.read_index(str(folder.index / shard.file))
        assert index.metric_type == faiss.METRIC_INNER_PRODUCT
        for number in range(shard.first_vector, shard.first_vector + shard.num_vectors):
            np.testing.assert_array_equal(index.reconstruct(number), vectors[kept[number]])
    rows = pq.read_table(folder.index / "rows.parquet")
    assert rows.schema.types == [pa.int64(), pa.string(), pa.int64(), pa.int32(), pa.string()]
    assert rows.to_pydict() == {
        "vector": list(range(22)),
        "job": ["mine"] * 22,
        "row": kept.tolist(),
        "sample": [0] * 22,
        "field": ["prompt"] * 22,
    }


def test_a_single_shard_is_a_plain_flat_index(committed: Committed, provenance: Provenance) -> None:
    folder, log = committed(unit(9))
    build_index(folder, log.commits, job="mine", provenance=provenance)
    index = faiss.read_index(str(folder.index / "shard-000.faiss"))
    assert isinstance(index, faiss.IndexFlat)
    np.testing.assert_array_equal(index.reconstruct_n(0, 9), unit(9))


def test_each_vector_is_indexed_once_also_with_samples_and_both_fields(tmp_path: Path, provenance: Provenance) -> None:
    folder = JobFolder(tmp_path / "out")
    log = CommitLog(folder, fingerprint="f")
    log.recover()
    layout = RecordLayout.of(samples=2, embeds="both", dimension=2)
    builder = PartBuilder(layout, split=0, first_row=0, num_rows=2)
    for row, sample in itertools.product(range(2), range(2)):
        builder.add(row, sample=sample, text="", finish_reason="stop", prompt_tokens=1, completion_tokens=0)
        builder.add_vector(row, "generation", np.array([row, 1 + sample], np.float32), sample=sample)
        if sample == 0:
            builder.add_vector(row, "prompt", np.array([row, -1], np.float32))
    log.publish(log.commit(builder.write(folder)))
    build_index(folder, log.commits, job="mine", provenance=provenance)
    rows = pq.read_table(folder.index / "rows.parquet").to_pydict()
    assert list(zip(rows["row"], rows["sample"], rows["field"], strict=True)) == [
        (0, 0, "prompt"),
        (0, 0, "generation"),
        (0, 1, "generation"),
        (1, 0, "prompt"),
        (1, 0, "generation"),
        (1, 1, "generation"),
    ]
    index = faiss.read_index(str(folder.index / "shard-000.faiss"))
    assert index.reconstruct_n(0, 6)[:, 1].tolist() == [-1, 1, 2, -1, 1, 2]


def test_small_batches_and_row_groups_change_nothing(
    committed: Committed, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = unit(40)
    folder, log = committed(vectors)
    batches = list(committed_vectors(folder, log.commits, batch_bytes=100))
    assert max(len(batch.rows) for batch in batches) == 3
    np.testing.assert_array_equal(np.concatenate([batch.matrix for batch in batches]), vectors)
    monkeypatch.setattr(row_map, "GROUP_ROWS", 4)
    build_index(folder, log.commits, job="mine", provenance=provenance, shards=2)
    assert pq.ParquetFile(folder.index / "rows.parquet").num_row_groups == 10
    places = VectorIndex.open(folder.index).rows.places([39, 0, 17, 39])
    assert [place.row for place in places] == [39, 0, 17, 39]


def test_of_a_part_only_what_is_looked_at_is_in_memory(committed: Committed) -> None:
    vectors = unit(7, 1 << 18)  # 7 MiB in one row group
    folder, log = committed(vectors)
    before, most = pa.total_allocated_bytes(), 0
    for batch in committed_vectors(folder, log.commits, batch_bytes=1 << 20):
        most = max(most, pa.total_allocated_bytes() - before)
        np.testing.assert_array_equal(batch.matrix, vectors[batch.rows])
    assert 0 < most < vectors.nbytes


@pytest.mark.parametrize("kind", ["Flat", "IVF4,Flat", "IVF4,PQ4x4"])
def test_built_twice_the_files_are_the_same(committed: Committed, provenance: Provenance, kind: str) -> None:
    folder, log = committed(unit(200))
    made = []
    for _ in range(2):
        build_index(folder, log.commits, job="mine", provenance=provenance, kind=kind, shards=2, recall=0, threads=1)
        made.append({path.name: path.read_bytes() for path in folder.index.iterdir()})
    assert made[0] == made[1]


@pytest.mark.parametrize("kind", ["IVF4,Flat", "HNSW8", "PCA4,IVF4,SQ8", "IVF4,PQ4x4,RFlat", "SQ8"])
@pytest.mark.parametrize("shards", [1, 3])
def test_any_factory_string_gives_global_vector_numbers(
    committed: Committed, provenance: Provenance, kind: str, shards: int
) -> None:
    vectors = unit(400)
    folder, log = committed(vectors)
    manifest = build_index(folder, log.commits, job="mine", provenance=provenance, kind=kind, shards=shards, recall=0)
    assert manifest.kind == kind
    numbers = np.concatenate(
        [
            faiss.read_index(str(folder.index / shard.file)).search(
                vectors[shard.first_vector : shard.first_vector + shard.num_vectors], 1
            )[1][:, 0]
            for shard in manifest.shards
        ]
    )
    assert (numbers == np.arange(400)).mean() > 0.2  # by chance 0.01 at most; PQ and PCA lose much at this width


@pytest.mark.parametrize(("kind", "expected"), [("Nonsense", "no FAISS factory string"), ("IVF99,Flat", "99")])
def test_a_kind_that_cannot_be_made_is_one_line(
    committed: Committed, provenance: Provenance, kind: str, expected: str
) -> None:
    folder, log = committed(unit(9))
    with pytest.raises(UserError, match=expected) as caught:
        build_index(folder, log.commits, job="mine", provenance=provenance, kind=kind)
    assert "\n" not in str(caught.value)
    assert "cpp" not in str(caught.value)
    assert os.listdir(folder.attempts) == []


@pytest.mark.parametrize("kind", ["auto", "IVF2,Flat", "OPQ2,IVF2,PQ2", "SQ8", "HNSW4"])
def test_an_index_of_no_vectors_can_be_built_and_searched(
    committed: Committed, provenance: Provenance, kind: str
) -> None:
    folder, log = committed(np.full((3, 4), np.nan, np.float32))
    build_index(folder, log.commits, job="mine", provenance=provenance, shards=2, kind=kind)
    assert faiss.read_index(str(folder.index / "shard-000.faiss")).ntotal == 0
    assert VectorIndex.open(folder.index).search(np.ones(4), 3) == [[]]


def test_a_job_without_rows_needs_no_index(tmp_path: Path, provenance: Provenance) -> None:
    folder = JobFolder(tmp_path / "out")
    folder.create()
    assert index_is_current(folder, {}, job="mine", provenance=provenance, kind="auto", shards=1)


def test_a_job_without_embeddings_has_no_index(tmp_path: Path, provenance: Provenance) -> None:
    folder = JobFolder(tmp_path / "out")
    log = CommitLog(folder, fingerprint="f")
    log.recover()
    builder = PartBuilder(RecordLayout.of(samples=1, embeds=None), split=0, first_row=0, num_rows=1)
    builder.add(0, text="x", finish_reason="stop", prompt_tokens=1, completion_tokens=1)
    log.publish(log.commit(builder.write(folder)))
    with pytest.raises(UserError, match="no embeddings"):
        build_index(folder, log.commits, job="mine", provenance=provenance)


def test_a_part_with_fewer_vectors_than_its_commit_says_is_not_indexed(
    committed: Committed, provenance: Provenance
) -> None:
    folder, log = committed(unit(9))
    table = pq.read_table(folder.part(1))
    pq.write_table(table.slice(0, 1), folder.part(1))
    with pytest.raises(JobError, match=r"part-000001\.parquet holds 1 vectors and its commit says 2"):
        build_index(folder, log.commits, job="mine", provenance=provenance)
    assert not folder.index.exists()


def test_whether_the_index_is_current_depends_on_all_that_made_it(committed: Committed, provenance: Provenance) -> None:
    folder, log = committed(unit(9))
    made: dict[str, Any] = {"job": "mine", "provenance": provenance, "kind": "Flat", "shards": 2}
    assert not index_is_current(folder, log.commits, **made)
    build_index(folder, log.commits, **made)
    assert index_is_current(folder, log.commits, **made)
    assert index_is_current(folder, log.commits, **{**made, "kind": "auto"})
    for changed in [
        {"job": "yours"},
        {"kind": "SQ8"},
        {"shards": 1},
        {"provenance": Provenance(model="tiny", model_files={}, tokenizer="bb", pooling="mean")},
    ]:
        assert not index_is_current(folder, log.commits, **{**made, **changed})
    assert not index_is_current(folder, {0: log.commits[0]}, **made)
    os.truncate(folder.index / "shard-001.faiss", 10)
    assert not index_is_current(folder, log.commits, **made)


def test_an_index_of_an_older_format_is_built_anew(committed: Committed, provenance: Provenance) -> None:
    folder, log = committed(unit(9))
    made: dict[str, Any] = {"job": "mine", "provenance": provenance, "kind": "auto", "shards": 1}
    build_index(folder, log.commits, **made)
    path = folder.index / "index.json"
    document = read_sealed(path)
    path.write_bytes(seal({**document, "format": 1}))
    with pytest.raises(JobError, match="format 1, not 2; `gristmill run` builds it anew from the parts"):
        read_manifest(folder.index)
    assert not index_is_current(folder, log.commits, **made)


def test_index_json_is_read_back_as_it_was_written(committed: Committed, provenance: Provenance) -> None:
    folder, log = committed(unit(40))
    for kind in ("Flat", "IVF2,Flat"):
        manifest = build_index(folder, log.commits, job="mine", provenance=provenance, kind=kind, shards=2)
        assert read_manifest(folder.index) == manifest


def test_an_index_made_another_way_is_told_by_what_differs(committed: Committed, provenance: Provenance) -> None:
    folder, log = committed(unit(9))
    build_index(folder, log.commits, job="mine", provenance=provenance)
    made = read_manifest(folder.index).provenance
    assert made.difference(provenance) is None
    assert (
        made.difference(dataclasses.replace(provenance, model="elsewhere", query_template="query: {{ text }}")) is None
    )
    changes: list[dict[str, Any]] = [
        {"pooling": "last"},
        {"model_files": {"model.safetensors": "cc"}},
        {"settings": {"echo": True}},
    ]
    for changed in changes:
        difference = made.difference(dataclasses.replace(provenance, **changed))
        assert difference is not None
        assert difference.startswith(next(iter(changed)))


@pytest.mark.parametrize("exchange", [True, False])
def test_whatever_step_building_dies_at_an_index_is_whole(
    committed: Committed,
    provenance: Provenance,
    filesystem: Any,
    monkeypatch: pytest.MonkeyPatch,
    exchange: bool,
) -> None:
    """Where names can be exchanged the old index stands until the new one does; else it may be missing, never mixed."""
    if not exchange:
        monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    for step in itertools.count():
        folder, log = committed(unit(9), name=str(step))
        first = {0: log.commits[0]}
        build_index(folder, first, job="mine", provenance=provenance)
        with filesystem.dies_at(step):
            build_index(folder, log.commits, job="mine", provenance=provenance)
        finished = not filesystem.died
        if exchange or folder.index.exists():
            assert VectorIndex.open(folder.index).manifest.num_vectors in (7, 9)
        again = CommitLog(folder, fingerprint="this job")
        again.recover()
        assert os.listdir(folder.attempts) == []
        if not index_is_current(folder, again.commits, job="mine", provenance=provenance, kind="auto", shards=1):
            build_index(folder, again.commits, job="mine", provenance=provenance)
        assert VectorIndex.open(folder.index).manifest.num_vectors == 9
        if finished:
            break
    assert step > 15


def test_the_index_is_on_the_disk_before_it_takes_its_place(
    committed: Committed, provenance: Provenance, filesystem: Any
) -> None:
    folder, log = committed(unit(9))
    with filesystem.dies_at(None):
        build_index(folder, log.commits, job="mine", provenance=provenance)
    manifest, names, place = ["open", "write", "fsync"], ["open", "fsync"], ["rename", "open", "fsync"]
    assert filesystem.trace[-8:] == manifest + names + place
    assert filesystem.trace.count("fsync") == 5  # rows.parquet, a shard, index.json, their folder, the folder around it


def test_a_full_disk_is_one_line_and_leaves_the_old_index(
    committed: Committed, provenance: Provenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, log = committed(unit(9))
    build_index(folder, {0: log.commits[0]}, job="mine", provenance=provenance)

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(JobError, match="no space left"):
        build_index(folder, log.commits, job="mine", provenance=provenance)
    assert VectorIndex.open(folder.index).manifest.num_vectors == 7
    assert os.listdir(folder.attempts) == []


def test_the_number_of_faiss_threads_is_kept_for_the_call_only(committed: Committed, provenance: Provenance) -> None:
    folder, log = committed(unit(9))
    before = faiss.omp_get_max_threads()
    seen: list[int] = []
    make_index = faiss.index_factory

    def spy(*args: Any) -> Any:
        seen.append(faiss.omp_get_max_threads())
        return make_index(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faiss, "index_factory", spy)
        build_index(folder, log.commits, job="mine", provenance=provenance, threads=before + 1)
    assert set(seen) == {before + 1}
    assert faiss.omp_get_max_threads() == before
