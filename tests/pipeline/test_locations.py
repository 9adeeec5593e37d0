from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.locations import find_files, locate


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")


def found(folder: Path, pattern: str) -> list[str]:
    return [place.path.removeprefix(f"{folder}/") for place in find_files(f"{folder}/{pattern}").files]


def test_a_folder_means_what_lies_in_it_however_deep_but_for_hidden_names(tmp_path: Path) -> None:
    touch(tmp_path, "b.txt", "a/z.txt", "a/b/c.txt", "_logs/x.txt", ".git/x.txt", "a/_SUCCESS", "a/.crc")
    assert found(tmp_path, "") == ["a/b/c.txt", "a/z.txt", "b.txt"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.txt", ["1.txt", "2.txt"]),
        ("?.txt", ["1.txt", "2.txt"]),
        ("[2-9].txt", ["2.txt"]),
        ("*/1.txt", ["a/1.txt", "b/1.txt"]),
        ("**/1.txt", ["1.txt", "a/1.txt", "a/c/1.txt", "b/1.txt"]),
        ("a/**", ["a/1.txt", "a/c/1.txt"]),
        ("**/c/*", ["a/c/1.txt"]),
        ("*", ["1.txt", "2.txt", "a/1.txt", "a/c/1.txt", "b/1.txt"]),
        ("a/*/1.txt", ["a/c/1.txt"]),
        ("[ab]/1.txt", ["a/1.txt", "b/1.txt"]),
        (".*", [".hidden.txt"]),
    ],
)
def test_globs_find_files_by_path(tmp_path: Path, pattern: str, names: list[str]) -> None:
    touch(tmp_path, "2.txt", "1.txt", "a/1.txt", "a/c/1.txt", "b/1.txt", ".hidden.txt")
    assert found(tmp_path, pattern) == names


def test_a_file_whose_name_looks_like_a_glob_is_found_by_its_name(tmp_path: Path) -> None:
    touch(tmp_path, "a[1].txt", "a1.txt")
    assert found(tmp_path, "a[1].txt") == ["a[1].txt"]


def test_names_keep_their_odd_characters(tmp_path: Path) -> None:
    touch(tmp_path, "100% sure? #1 é.txt")
    (place,) = find_files(str(tmp_path)).files
    assert locate(place.name).path == place.path
    (place,) = find_files(f"file://{tmp_path}/100%25%20sure%3F%20%231%20%C3%A9.txt").files
    assert place.path == f"{tmp_path}/100% sure? #1 é.txt"


@pytest.mark.parametrize("pattern", ["missing.txt", "missing/", "*.csv", "missing/*.txt", "1.txt/*", "**/missing.txt"])
def test_what_is_not_there_is_the_users_to_mend(tmp_path: Path, pattern: str) -> None:
    touch(tmp_path, "1.txt")
    with pytest.raises(UserError, match=r"no such file or folder|no file matches"):
        found(tmp_path, pattern)


def test_an_empty_folder_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no files"):
        found(tmp_path, "")


@pytest.mark.parametrize("uri", ["nosuch://bucket/key", "s3:///key", "hdfs://nowhere.invalid:1/x"])
def test_a_uri_that_leads_nowhere_is_the_users_to_mend(uri: str) -> None:
    with pytest.raises(UserError, match="input "):
        find_files(uri)


class TestUris:
    """Through fsspec's in-memory filesystem, which pyarrow takes for a remote one."""

    @pytest.fixture(autouse=True)
    def memory(self) -> Any:
        fsspec = pytest.importorskip("fsspec")
        memory = fsspec.filesystem("memory")
        for name in ("corpus/b 100%.parquet", "corpus/a.parquet", "corpus/sub/c.parquet"):
            with memory.open(f"/{name}", "wb") as file:
                pq.write_table(pa.table({"t": [name]}), file)
        yield memory
        memory.rm("/corpus", recursive=True)

    def test_a_folder_and_a_glob_are_found(self) -> None:
        names = [place.name for place in find_files("fsspec+memory:///corpus").files]
        assert names == [
            "fsspec+memory:///corpus/a.parquet",
            "fsspec+memory:///corpus/b%20100%25.parquet",
            "fsspec+memory:///corpus/sub/c.parquet",
        ]
        assert [place.name for place in find_files("fsspec+memory:///corpus/*.parquet").files] == names[:2]
        assert [locate(name).path for name in names] == [
            place.path for place in find_files("fsspec+memory:///corpus").files
        ]
        assert [place.name for place in find_files(names[1]).files] == [names[1]]

    def test_rows_are_read(self, memory: Any) -> None:
        from pipeline.errors import JobError
        from pipeline.source import Source

        source = Source.open("fsspec+memory:///corpus/**/*.parquet")
        source = Source.from_json(source.to_json())
        source.check_unchanged()
        texts = [
            rows.batch.column("t").to_pylist()
            for split in Source.open("fsspec+memory:///corpus").splits()
            for rows in source.read(split, ["t"])
        ]
        assert texts == [["corpus/a.parquet"], ["corpus/b 100%.parquet"], ["corpus/sub/c.parquet"]]
        with memory.open("/corpus/a.parquet", "wb") as file:
            pq.write_table(pa.table({"t": ["another, longer text"]}), file)
        with pytest.raises(JobError, match=r"a.parquet has changed"):
            source.check_unchanged()
