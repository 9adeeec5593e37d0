from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from pipeline import source as source_module
from pipeline.commits import Commit
from pipeline.durable import file_sha256, seal
from pipeline.errors import JobError, UserError
from pipeline.job_folder import JobFolder
from pipeline.source import Source


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def texts(source: Source, column: str = "text") -> list[Any]:
    return [
        value
        for split in source.splits(3)
        for rows in source.read(split, [column])
        for value in rows.batch.column(column).to_pylist()
    ]


class TestWhichFilesAndFormat:
    def test_files_are_read_by_path_and_a_list_in_its_own_order(self, tmp_path: Path) -> None:
        for name in ("b", "a", "c/d"):
            write(tmp_path / f"{name}.parquet", text=[name])
        assert texts(Source.open(str(tmp_path))) == ["a", "b", "c/d"]
        paths = [str(tmp_path / "c"), str(tmp_path / "*.parquet"), str(tmp_path / "b.parquet")]
        assert texts(Source.open(paths)) == ["c/d", "a", "b"]

    def test_relative_paths_are_from_the_current_directory_and_stay_valid(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path / "a.parquet", text=["a"])
        monkeypatch.chdir(tmp_path)
        source = Source.open("a.parquet")
        splits = source.splits()
        monkeypatch.chdir("/")
        source = Source.from_json(source.to_json())
        source.check_unchanged()
        assert [rows.batch.num_rows for rows in source.read(splits[0], ["text"])] == [1]

    def test_what_lies_beside_the_data_in_a_folder_is_passed_over(self, tmp_path: Path) -> None:
        write(tmp_path / "a.parquet", text=["a"])
        (tmp_path / "README.md").write_text("about")
        (tmp_path / "notes.unknown").write_text("x")
        (tmp_path / "_SUCCESS").write_text("")
        assert texts(Source.open(str(tmp_path))) == ["a"]

    def test_a_folder_of_several_formats_needs_the_format_said(self, tmp_path: Path) -> None:
        write(tmp_path / "a.parquet", text=["a"])
        (tmp_path / "b.jsonl").write_text('{"text": "b"}')
        with pytest.raises(UserError, match=r"holds 1 parquet and 1 jsonl files"):
            Source.open(str(tmp_path))
        assert texts(Source.open(str(tmp_path), format="jsonl")) == ["b"]

    def test_a_name_that_tells_no_format_needs_it_said(self, tmp_path: Path) -> None:
        shutil.copy(write(tmp_path / "a.parquet", text=["a"]), tmp_path / "data")
        with pytest.raises(UserError, match=r"its name does not tell its format; say input.format"):
            Source.open(str(tmp_path / "data"))
        assert texts(Source.open(str(tmp_path / "data"), format="parquet")) == ["a"]
        with pytest.raises(UserError, match=r"no file in it has a known ending"):
            Source.open(str(write(tmp_path / "sub" / "x.dat", text=["a"]).parent))

    def test_an_unknown_format_is_refused_with_the_one_that_was_meant(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"'parket' is none of .*did you mean 'parquet'"):
            Source.open(str(write(tmp_path / "a.parquet", text=["a"])), format="parket")

    def test_input_without_rows_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="holds no rows"):
            Source.open(str(write(tmp_path / "a.parquet", text=pa.array([], pa.string()))))

    def test_either_a_path_or_a_job_is_needed(self) -> None:
        for arguments in ({}, {"path": "a", "job": "b"}):
            with pytest.raises(UserError, match="either path or job"):
                Source.open(**arguments)  # type: ignore[arg-type]


class TestColumns:
    def test_an_unknown_column_is_refused_with_the_one_that_was_meant(self, tmp_path: Path) -> None:
        source = Source.open(str(write(tmp_path / "a.parquet", body=["x"], title=["y"])))
        with pytest.raises(UserError, match=r"no column 'Bodi'; did you mean 'body'\? \(it has: body, title\)"):
            source.columns.select(["Bodi"])
        with pytest.raises(UserError, match=r"no column 'zzz' \(it has"):
            next(source.read(source.splits()[0], ["zzz"]))

    @pytest.mark.parametrize(
        ("schemas", "text_column"),
        [
            ({"body": ["a"], "n": [1]}, "body"),
            ({"body": ["a"], "title": ["b"]}, None),
            ({"n": [1]}, None),
            ({"text": ["a"], "title": ["b"]}, None),
        ],
    )
    def test_the_one_text_column_needs_no_naming(self, tmp_path: Path, schemas: Any, text_column: str | None) -> None:
        assert Source.open(str(write(tmp_path / "a.parquet", **schemas))).text_column == text_column

    def test_types_that_go_together_are_widened(self, tmp_path: Path) -> None:
        write(tmp_path / "a.parquet", n=pa.array([1], pa.int32()), t=pa.array(["x"]), f=pa.array([1], pa.int64()))
        write(tmp_path / "b.parquet", n=pa.array([2**40]), t=pa.array(["y"]).dictionary_encode(), f=pa.array([0.5]))
        write(tmp_path / "c.parquet", n=pa.nulls(1), t=pa.array(["z"], pa.large_string()), f=pa.nulls(1))
        source = Source.open(str(tmp_path))
        assert source.schema.types == [pa.int64(), pa.string(), pa.float64()]
        assert texts(source, "n") == [1, 2**40, None]
        assert texts(source, "t") == ["x", "y", "z"]
        assert texts(source, "f") == [1.0, 0.5, None]

    def test_types_that_do_not_go_together_are_refused_in_a_line_where_they_are_needed(self, tmp_path: Path) -> None:
        write(tmp_path / "a.parquet", text=["x"], n=["one"])
        write(tmp_path / "b.parquet", text=["y"], n=[1])
        source = Source.open(str(tmp_path))
        assert texts(source) == ["x", "y"]
        with pytest.raises(
            UserError, match=r"^input: column 'n' is string in \S+a.parquet but int64 in \S+b.parquet; "
        ):
            texts(source, "n")
        assert source.text_column == "text"

    def test_a_column_that_a_file_lacks_is_refused_in_a_line_where_it_is_needed(self, tmp_path: Path) -> None:
        write(tmp_path / "a.parquet", text=["x"])
        write(tmp_path / "b.parquet", text=["y"], n=[1])
        write(tmp_path / "c.parquet", n=[1])
        source = Source.open(str(tmp_path))
        with pytest.raises(UserError, match=r"column 'n' is in \S+b.parquet but not in \S+a.parquet; "):
            texts(source, "n")
        with pytest.raises(UserError, match=r"column 'text' is in \S+a.parquet but not in \S+c.parquet; "):
            Source.from_json(json.loads(json.dumps(source.to_json()))).columns.select(["text"])

    def test_two_columns_of_one_name_are_refused_where_they_are_needed(self, tmp_path: Path) -> None:
        table = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array(["x"])], names=["n", "n", "text"])
        with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        source = Source.open(str(tmp_path / "a.arrow"))
        assert texts(source) == ["x"]
        with pytest.raises(UserError, match=r"two columns of \S+ are called 'n'"):
            texts(source, "n")


class TestChanges:
    @pytest.fixture(params=["sha256", "size+mtime"])
    def opened(self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
        if request.param == "size+mtime":
            monkeypatch.setattr(source_module, "_HASHED_TOTAL_BYTES", 10)
        for name in ("a", "b"):
            write(tmp_path / f"{name}.parquet", text=[name] * 5)
        source = Source.open(str(tmp_path))
        assert all(file.digest.startswith(f"{request.param}:") for file in source.files)
        source = Source.from_json(json.loads(json.dumps(source.to_json())))
        source.check_unchanged()
        return source

    def test_a_changed_byte_is_noticed(self, opened: Source, tmp_path: Path) -> None:
        path = tmp_path / "b.parquet"
        content = bytearray(path.read_bytes())
        content[10] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
        with pytest.raises(JobError, match=r"b.parquet has changed since the job was planned: its"):
            opened.check_unchanged()

    def test_another_size_is_noticed(self, opened: Source, tmp_path: Path) -> None:
        write(tmp_path / "a.parquet", text=["a"] * 5000)
        with pytest.raises(JobError, match=r"a.parquet has changed since the job was planned: \d+ bytes then, \d+ now"):
            opened.check_unchanged()

    def test_files_that_came_or_went_are_noticed(self, opened: Source, tmp_path: Path) -> None:
        shutil.copy(tmp_path / "a.parquet", tmp_path / "c.parquet")
        with pytest.raises(JobError, match=r"c.parquet has been added since the job was planned"):
            opened.check_unchanged()
        (tmp_path / "c.parquet").unlink()
        (tmp_path / "b.parquet").unlink()
        with pytest.raises(JobError, match=r"b.parquet is gone since the job was planned"):
            opened.check_unchanged()
        shutil.rmtree(tmp_path)
        with pytest.raises(JobError, match=r"no such file or folder; the input has changed since the job was planned"):
            opened.check_unchanged()

    def test_reading_a_file_that_is_gone_says_so(self, opened: Source, tmp_path: Path) -> None:
        splits = Source.open(str(tmp_path)).splits()
        (tmp_path / "b.parquet").unlink()
        with pytest.raises(JobError, match=r"b.parquet is gone since the job was planned"):
            list(opened.read(splits[1], ["text"]))


def test_the_same_bytes_at_another_time_are_the_same_input(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", text=["a"])
    source = Source.open(str(path))
    os.utime(path, (0, 0))
    source.check_unchanged()


class TestRowsOfAnotherJob:
    @pytest.fixture
    def job(self, tmp_path: Path) -> JobFolder:
        folder = JobFolder(tmp_path / "other")
        folder.create()
        for split in (10, 2, 0):
            self.commit(folder, split, [f"text {split}", None])
        return folder

    @staticmethod
    def commit(folder: JobFolder, split: int, texts: list[str | None], revision: int = 0) -> None:
        path = write(folder.part(split), text=pa.array(texts, pa.string()), body=["carried"] * len(texts))
        commit = Commit(
            split=split,
            revision=revision,
            path="",
            sha256=file_sha256(path),
            size_bytes=path.stat().st_size,
            first_row=0,
            rows=len(texts),
            records=len(texts),
            samples=len(texts),
            errors=0,
            error_codes={},
            vectors={},
            prompt_tokens=0,
            completion_tokens=0,
            part=path.name,
            fingerprint="",
        )
        folder.commit(split, revision).write_bytes(seal(commit.to_json()))

    def test_are_read_in_the_order_of_splits(self, job: JobFolder) -> None:
        source = Source.open(job=str(job.root))
        assert source.text_column == "text"
        assert texts(source) == ["text 0", None, "text 2", None, "text 10", None]
        Source.from_json(source.to_json()).check_unchanged()

    def test_are_those_of_the_latest_revision(self, job: JobFolder) -> None:
        self.commit(job, 2, ["again", "more", "rows"], revision=1)
        assert texts(Source.open(job=str(job.root)))[2:5] == ["again", "more", "rows"]

    def test_are_only_the_committed_ones(self, job: JobFolder) -> None:
        write(job.part(11), text=["not committed"])
        assert Source.open(job=str(job.root)).num_rows == 6

    def test_that_change_are_noticed(self, job: JobFolder) -> None:
        source = Source.open(job=str(job.root))
        self.commit(job, 11, ["new"])
        with pytest.raises(JobError, match=r"part-000011.parquet has been added"):
            source.check_unchanged()

    def test_that_were_altered_are_refused(self, job: JobFolder) -> None:
        write(job.part(2), text=["other", "text"], body=["carried"] * 2)
        with pytest.raises(UserError, match=r"part-000002.parquet is not what was committed; see gristmill verify"):
            Source.open(job=str(job.root))

    def test_that_are_missing_are_refused(self, job: JobFolder) -> None:
        job.part(2).unlink()
        with pytest.raises(UserError, match=r"part-000002.parquet is committed but missing"):
            Source.open(job=str(job.root))

    def test_a_damaged_commit_is_refused(self, job: JobFolder) -> None:
        job.commit(2, 0).write_text("{}")
        with pytest.raises(UserError, match=r"input.job .*see gristmill verify"):
            Source.open(job=str(job.root))

    def test_a_folder_that_is_no_job_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="not a job directory"):
            Source.open(job=str(tmp_path))
        (tmp_path / "commits").mkdir()
        with pytest.raises(UserError, match="no committed rows yet"):
            Source.open(job=str(tmp_path))
