from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import JobError, UserError
from pipeline.formats import lines
from pipeline.source import Source


def write(folder: Path, **files: bytes | str) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_a_file_named_by_itself_is_a_row_a_line(tmp_path: Path, read_all: Any) -> None:
    write(tmp_path, a_txt="first\r\n\n  second \nthird")
    rows, errors = read_all(tmp_path / "a.txt", rows_per_split=2)
    assert rows == [{"text": "first"}, {"text": "  second "}, {"text": "third"}]
    assert errors == {}


def test_files_in_a_folder_or_a_glob_are_a_row_each(tmp_path: Path, read_all: Any) -> None:
    write(tmp_path, b_txt="two\nlines\n", a_md="# one", sub__c_txt="three", _hidden_txt="no", LICENSE="no")
    names = ["a.md", "b.txt", "sub/c.txt"]
    rows, _ = read_all(tmp_path, rows_per_split=2)
    assert [row["text"] for row in rows] == ["# one", "two\nlines\n", "three"]
    assert [row["path"] for row in rows] == [str(tmp_path / name) for name in names]
    assert (
        read_all(str(tmp_path / "**"), format="text")[0][0]["text"] == "no"
    )  # LICENSE, since a glob says what it means
    assert [row["text"] for row in read_all(f"{tmp_path}/*.txt")[0]] == ["two\nlines\n"]


def test_the_format_may_be_said(tmp_path: Path, read_all: Any) -> None:
    write(tmp_path, a_txt="one\ntwo", b_log="three\nfour")
    assert [row["text"] for row in read_all(tmp_path / "a.txt", format="text")[0]] == ["one\ntwo"]
    assert [row["text"] for row in read_all(tmp_path, format="lines")[0]] == ["one", "two"]
    assert [row["text"] for row in read_all(tmp_path / "b.log", format="lines")[0]] == ["three", "four"]


def test_many_files_of_a_row_each_share_splits(tmp_path: Path, read_all: Any) -> None:
    write(tmp_path, **{f"d{i:03}_txt": f"document {i}" for i in range(100)})
    source = Source.open(str(tmp_path))
    assert [split.num_rows for split in source.splits(40)] == [40, 40, 20]
    assert source.text_column == "text"
    rows, _ = read_all(tmp_path, ["text"], rows_per_split=40, max_bytes=100, order=lambda splits: splits[::-1])
    assert [row["text"] for row in rows] == [f"document {i}" for i in range(100)]


def test_text_that_is_no_utf8_costs_its_row(tmp_path: Path, read_all: Any) -> None:
    write(tmp_path, a_txt=b"\xff\xfea\0", b_txt=b"caf\xe9", c_txt=b"\xef\xbb\xbffine", d_txt=b"", e_txt=b"\xed\xa0\x80")
    rows, errors = read_all(tmp_path)
    assert errors == {0: "not_text", 1: "not_text", 4: "not_text"}
    assert [row["text"] for row in rows] == [None, None, "fine", "", None]
    write(tmp_path, lines_txt=b"\xef\xbb\xbfgood\ncaf\xe9\n\xed\xa0\x80\nalso good")
    rows, errors = read_all(tmp_path / "lines.txt")
    assert errors == {1: "not_text", 2: "not_text"}
    assert [row["text"] for row in rows] == ["good", None, None, "also good"]


def test_a_document_that_changed_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, a_txt="one", b_txt="two")
    source = Source.open(str(tmp_path))
    write(tmp_path, b_txt="longer")
    with pytest.raises(JobError, match=r"b.txt has changed"):
        list(source.read(source.splits()[0], ["text"]))
    (tmp_path / "b.txt").unlink()
    with pytest.raises(JobError, match=r"b.txt"):
        list(source.read(source.splits()[0], ["text"]))


def test_utf16_lines_are_refused_with_the_way_out(tmp_path: Path) -> None:
    write(tmp_path, a_txt="text".encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16"):
        Source.open(str(tmp_path / "a.txt"))


def test_blank_files_hold_no_rows(tmp_path: Path) -> None:
    write(tmp_path, a_txt="\n \n\r\n")
    with pytest.raises(UserError, match="holds no rows"):
        Source.open(str(tmp_path / "a.txt"))


@settings(max_examples=300, deadline=None)
@given(
    content=st.lists(st.sampled_from([b"\n", b"\n\n", b" ", b"\r", b"ab", b"\xef\xbb\xbf", b"\xff", b"c" * 9])).map(
        b"".join
    ),
    chunk_bytes=st.integers(1, 12),
    rows_per_split=st.integers(1, 4),
)
def test_lines_are_found_wherever_chunks_end(
    tmp_path_factory: pytest.TempPathFactory, read_all: Any, content: bytes, chunk_bytes: int, rows_per_split: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes(content + b"\nend")
    expected = [line.removesuffix(b"\r") for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    expected = [line for line in expected if line.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_CHUNK_BYTES", chunk_bytes)
        rows, errors = read_all(path, rows_per_split=rows_per_split)
    assert [row["text"] for row in rows] == [None if b"\xff" in line else line.decode() for line in expected]
    assert sorted(errors) == [row for row, line in enumerate(expected) if b"\xff" in line]


def test_a_line_that_is_too_long_is_never_held(tmp_path: Path) -> None:
    content = b"short\n" + b"x" * 100 + b"\n\nshort\n" + b"y" * 100
    for chunk_bytes in (1, 7, 50):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lines, "_CHUNK_BYTES", chunk_bytes)
            found = list(lines.read_lines(pa.BufferReader(content), 0, max_line_bytes=50))
            assert found == [(0, b"short"), (6, None), (108, b"short"), (114, None)]
