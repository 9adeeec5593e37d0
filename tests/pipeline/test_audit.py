"""The audit holds for a whole job, and says in one line what is missing, changed, foreign, or there twice."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.audit import Audit, audit
from pipeline.commits import CommitLog
from pipeline.durable import file_sha256, read_sealed, seal, unseal
from pipeline.errors import UserError
from pipeline.job_folder import JobFolder, write_job
from tests.pipeline.audited_job import finish, part_of, planned


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = JobFolder(tmp_path_factory.mktemp("job") / "whole")
    finish(folder, planned(folder))
    return folder.root


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> JobFolder:
    """A finished job's directory, to be damaged."""
    shutil.copytree(whole, tmp_path / "out")
    return JobFolder(tmp_path / "out")


def only_problem(found: Audit) -> str:
    assert not found.ok
    assert len(found.problems) == 1, found.problems
    assert "\n" not in found.problems[0]
    return found.problems[0]


def test_the_audit_of_a_whole_job_holds(folder: JobFolder) -> None:
    found = audit(folder.root)
    assert (found.ok, found.problems, found.pending) == (True, (), ())
    assert (found.rows_planned, found.rows, found.errors, found.records) == (11, 11, 1, 21)
    assert found.vectors == found.indexed_vectors == 10 + 20
    assert found.error_codes == {"prompt_too_long": 1}
    assert json.loads(json.dumps(found.to_json()))["ok"] is True


@pytest.mark.parametrize("kind", ["IVF2,Flat", "HNSW4", "SQ8"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_audit_holds_for_other_kinds_of_index(tmp_path: Path, kind: str, shards: int) -> None:
    folder = JobFolder(tmp_path / "out")
    finish(folder, planned(folder), kind=kind, shards=shards)
    assert audit(folder.root).ok


def test_a_changed_byte_anywhere_is_seen(folder: JobFolder) -> None:
    """Ten bytes in each file that the audit vouches for."""
    chance = random.Random(0)
    files = [folder.job_file, folder.plan_file]
    files += [path for name in ("parts", "commits", "index") for path in sorted((folder.root / name).iterdir())]
    for path in files:
        content = path.read_bytes()
        for _ in range(10):
            changed = bytearray(content)
            changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            path.write_bytes(changed)
            found = audit(folder.root)
            assert any(str(path) in problem for problem in found.problems), (path, found)
        path.write_bytes(content)
    assert audit(folder.root).ok


@pytest.mark.parametrize("name", ["job.json", "plan.json", "parts/part-000001.parquet", "index/index.json"])
@pytest.mark.parametrize("how", ["missing", "truncated", "empty"])
def test_a_file_that_is_missing_or_cut_off_is_one_line(folder: JobFolder, name: str, how: str) -> None:
    path = folder.root / name
    if how == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2 if how == "truncated" else 0)
    assert str(path) in only_problem(audit(folder.root))


@pytest.mark.parametrize("name", ["shard-000.faiss", "shard-001.faiss", "rows.parquet"])
def test_an_index_file_that_is_missing_or_another_is_one_line(folder: JobFolder, name: str) -> None:
    path = folder.index / name
    path.unlink()
    assert f"{path} is missing" in only_problem(audit(folder.root))
    shutil.copy(folder.part(0), path)
    assert f"{path} is damaged" in only_problem(audit(folder.root))


def test_a_missing_commit_leaves_a_part_that_nothing_stands_for(folder: JobFolder) -> None:
    folder.commit(1, 0).unlink()
    found = audit(folder.root)
    assert "has no commit" in only_problem(found)
    assert any("1 of 3 splits, 4 rows, are not done yet" in line for line in found.pending)


@pytest.mark.parametrize(
    "place", ["parts/part-000009.parquet", "parts/notes.txt", "commits/notes.txt", "index/x.faiss"]
)
def test_a_foreign_file_is_one_line(folder: JobFolder, place: str) -> None:
    (folder.root / place).write_text("what is this")
    assert str(folder.root / place) in only_problem(audit(folder.root))


def test_a_split_that_is_there_twice_is_seen(folder: JobFolder) -> None:
    shutil.copy(folder.part(1), folder.parts / "part-000003.parquet")
    shutil.copy(folder.commit(1, 0), folder.commits / "000003.json")
    assert any("000003.json" in problem for problem in audit(folder.root).problems)


def test_another_jobs_part_with_its_commit_is_seen(folder: JobFolder, tmp_path: Path) -> None:
    other = JobFolder(tmp_path / "other")
    other.create()
    log = CommitLog(other, fingerprint="that job")
    log.recover()
    log.publish(log.commit(part_of(other, 1)))
    shutil.copy(other.commit(1, 0), folder.commit(1, 0))
    shutil.copy(other.part(1), folder.part(1))
    assert any("another job's" in problem for problem in audit(folder.root).problems)


def reseal(folder: JobFolder, path: Path, **changes: Any) -> None:
    path.write_bytes(seal({**unseal(path.read_bytes(), path), **changes}))


def rewrite(folder: JobFolder, split: int, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes a part as a faulty writer would: its commit says what the file's bytes are."""
    path = folder.part(split)
    pq.write_table(change(pq.read_table(path)), path)
    reseal(folder, folder.commit(split, 0), sha256=file_sha256(path), size_bytes=path.stat().st_size)


def replaced(table: pa.Table, name: str, values: Any) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


def test_rows_are_counted_in_the_part_itself_not_only_in_its_commit(folder: JobFolder) -> None:
    cases: list[tuple[Callable[[pa.Table], pa.Table], str]] = [
        (lambda table: table.slice(0, table.num_rows - 2), "row 7 is missing"),
        (lambda table: table.slice(0, table.num_rows - 1), "row 7 is without some of the 2 samples"),
        (lambda table: pa.concat_tables([table, table.slice(6)]), "row 7 is there more than once"),
        (lambda table: pa.concat_tables([table.slice(2), table.slice(0, 2)]), "its rows are not in order"),
        (
            lambda table: replaced(table, "row", [4, 4, 5, 6, 6, 9, 9]),
            "row 9 is not of this split, which has rows 4 to 7",
        ),
        (lambda table: replaced(table, "sample", [0, 0, 0, 0, 1, 0, 1]), "row 4 is with samples that are not numbered"),
        (
            lambda table: replaced(table, "error_code", [None, "internal", *table["error_code"].to_pylist()[2:]]),
            "row 4 is failed and yet there with several records",
        ),
        (lambda table: replaced(table, "error_code", [None] * 7), "its commit says {'prompt_too_long': 1}"),
        (
            lambda table: replaced(table, "prompt_embedding", [None, *table["prompt_embedding"].to_pylist()[1:]]),
            "row 4 is with a vector in prompt_embedding though failed, or without one though not",
        ),
        (
            lambda table: replaced(
                table, "generation_embedding", [[np.nan] * 4, *table["generation_embedding"].to_pylist()[1:]]
            ),
            "row 4 is with NaN, infinities or nothing but zeros in generation_embedding",
        ),
        (lambda table: table.drop_columns(["text"]), "not those of a part"),
    ]
    part, commit = folder.part(1).read_bytes(), folder.commit(1, 0).read_bytes()
    for change, expected in cases:
        rewrite(folder, 1, change)
        problems = audit(folder.root).problems
        assert any(f"{folder.part(1)}: " in problem and expected in problem for problem in problems), problems
        folder.part(1).write_bytes(part)
        folder.commit(1, 0).write_bytes(commit)
    assert audit(folder.root).ok


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rows": 5}, "and the plan 4 from 4 on"),
        ({"first_row": 3}, "and the plan 4 from 4 on"),
        ({"samples": 1}, "has 1 samples a row, unlike the others"),
        ({"vectors": {"prompt": 2, "generation": 6}}, "holds 3 vectors of the prompt, and its commit says 2"),
        ({"records": 8}, "holds 7 records, and its commit says 8"),
    ],
)
def test_a_commit_that_does_not_fit_plan_or_part_is_seen(
    folder: JobFolder, changes: dict[str, Any], expected: str
) -> None:
    reseal(folder, folder.commit(1, 0), **changes)
    problems = audit(folder.root).problems
    assert any(expected in problem for problem in problems), problems


def test_a_plan_with_a_gap_or_of_another_job_is_seen(folder: JobFolder) -> None:
    plan = folder.plan_file.read_bytes()
    splits = unseal(plan, folder.plan_file)["splits"]
    reseal(folder, folder.plan_file, splits=[splits[0], splits[2]])
    assert any("is no plan" in problem for problem in audit(folder.root).problems)
    folder.plan_file.write_bytes(plan)
    reseal(folder, folder.plan_file, fingerprint="that job")
    assert "another job's" in only_problem(audit(folder.root))


def test_an_index_with_another_number_of_vectors_is_seen(folder: JobFolder) -> None:
    """Consistently: its manifest vouches for the shorter files."""
    index = faiss.read_index(str(folder.index / "shard-001.faiss"))
    index.remove_ids(np.array([29]))
    faiss.write_index(index, str(folder.index / "shard-001.faiss"))
    reshard(folder, 1, num_vectors=14)
    problems = audit(folder.root).problems
    assert any("its shards have 29 of 30 vectors" in problem for problem in problems), problems
    rows = read_sealed(folder.index / "index.json")["rows"] | {"num_vectors": 29}
    reseal(folder, folder.index / "index.json", num_vectors=29, rows=rows)
    problems = audit(folder.root).problems
    assert any("its jobs have 30 of 29 vectors" in problem for problem in problems), problems
    (job,) = read_sealed(folder.index / "index.json")["jobs"]
    reseal(folder, folder.index / "index.json", jobs=[job | {"num_vectors": 29}])
    problems = audit(folder.root).problems
    assert any(f"the index holds 29 vectors of {job['job']}, and the parts hold 30" in problem for problem in problems)


def reshard(folder: JobFolder, number: int, **changes: Any) -> None:
    path = folder.index / "index.json"
    shards = unseal(path.read_bytes(), path)["shards"]
    file = folder.index / shards[number]["file"]
    shards[number] |= {"sha256": file_sha256(file), "size_bytes": file.stat().st_size, **changes}
    reseal(folder, path, shards=shards)


def test_a_vector_that_is_not_the_parts_is_seen_also_when_the_hash_is_right(folder: JobFolder) -> None:
    index = faiss.read_index(str(folder.index / "shard-001.faiss"))
    flat = faiss.downcast_index(index.index)
    faiss.rev_swig_ptr(flat.get_xb(), 15 * 4)[13] *= -1
    faiss.write_index(index, str(folder.index / "shard-001.faiss"))
    reshard(folder, 1)
    assert "vector 18 is not the embedding" in only_problem(audit(folder.root))


def test_vectors_with_other_numbers_are_seen(folder: JobFolder) -> None:
    index = faiss.read_index(str(folder.index / "shard-001.faiss"))
    vectors = faiss.downcast_index(index.index).reconstruct_n(0, 15)
    other = faiss.IndexIDMap2(faiss.IndexFlatIP(4))
    other.add_with_ids(vectors, np.arange(15))  # as if shards were numbered each from 0
    faiss.write_index(other, str(folder.index / "shard-001.faiss"))
    reshard(folder, 1)
    assert "are not numbered as index.json says" in only_problem(audit(folder.root))


@pytest.mark.parametrize("column", ["vector", "row", "sample", "job", "field"])
def test_a_record_of_rows_parquet_that_stands_for_another_row_is_seen(folder: JobFolder, column: str) -> None:
    path = folder.index / "rows.parquet"
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[17] = values[17] + 1 if isinstance(values[17], int) else f"not {values[17]}"
    pq.write_table(replaced(table, column, values), path)
    manifest = folder.index / "index.json"
    rows = unseal(manifest.read_bytes(), manifest)["rows"]
    reseal(folder, manifest, rows={**rows, "sha256": file_sha256(path), "size_bytes": path.stat().st_size})
    assert "rows.parquet: vector 17 does not stand for the row" in only_problem(audit(folder.root))


def test_a_damaged_part_does_not_make_the_index_a_second_problem(folder: JobFolder) -> None:
    os.truncate(folder.part(2), 50)
    assert "part-000002.parquet is damaged" in only_problem(audit(folder.root))


def test_a_job_that_embeds_nothing_or_wants_no_index_needs_none(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "out")
    finish(folder, planned(folder))
    shutil.rmtree(folder.index)
    write_job(folder, fingerprint="this job", document={"spec": {"index": None}})
    assert audit(folder.root).ok


def test_a_folder_that_is_no_job_directory_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="not a job directory"):
            audit(path)


def test_the_audit_changes_nothing(folder: JobFolder) -> None:
    def state() -> dict[str, tuple[int, bytes]]:
        return {
            str(path): (path.stat().st_mtime_ns, path.read_bytes())
            for path in sorted(folder.root.rglob("*"))
            if path.is_file()
        }

    before = state()
    audit(folder.root)
    assert state() == before
