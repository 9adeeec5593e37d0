from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RowError, UserError
from pipeline.formats.delimited import read_records
from pipeline.source import Source


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines_of(content: bytes) -> Any:
    offset = 0
    for line in content.splitlines(keepends=True):
        yield offset, line.rstrip(b"\n")
        offset += len(line)


def test_quotes_hold_delimiters_quotes_and_line_ends(tmp_path: Path, read_all: Any) -> None:
    path = write(tmp_path / "a.csv", 'a,b\n1,"x, ""y""\n\nz"\r\n2,"\n"\n')
    assert read_all(path, rows_per_split=1) == ([{"a": "1", "b": 'x, "y"\n\nz'}, {"a": "2", "b": "\n"}], {})


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ("1", "malformed_record"),
        ("1,2,3", "malformed_record"),
        ("1,x\ry", "malformed_record"),
        (b"1,\xff", "not_text"),
        (b"1,\xed\xa0\x80", "not_text"),
    ],
)
def test_a_bad_record_is_an_error_of_its_row_alone(tmp_path: Path, read_all: Any, record: Any, code: str) -> None:
    record = record if isinstance(record, bytes) else record.encode()
    path = write(tmp_path / "a.csv", b"a,b\n0,zero\n" + record + b"\n2,two\n")
    rows, errors = read_all(path, rows_per_split=2)
    assert errors == {1: code}
    assert rows == [{"a": "0", "b": "zero"}, {"a": None, "b": None}, {"a": "2", "b": "two"}]


def test_a_quote_that_is_never_closed_costs_its_line_alone(tmp_path: Path, read_all: Any) -> None:
    path = write(tmp_path / "a.csv", 'a,b\n0,zero\n1,"open\n2,two\n3,th"ree\n4,four\n')
    # The quote within `th"ree` would close the field of line 1: what opens and closes is one record.
    rows, errors = read_all(path, rows_per_split=1)
    assert [row["a"] for row in rows] == ["0", "1", "4"]
    path = write(tmp_path / "a.csv", 'a,b\n0,zero\n1,"open\n2,two\n3,three\n')
    rows, errors = read_all(path, rows_per_split=1)
    assert errors == {1: "malformed_record"}
    assert [row["a"] for row in rows] == ["0", None, "2", "3"]
    assert read_all(path, rows_per_split=1, order=lambda splits: splits[::-1]) == (rows, errors)


def test_a_quote_that_stays_open_for_too_long_costs_its_line_alone() -> None:
    content = b'a,"open\n' + b"x,y\n" * 100 + b'z,"closed"\n'
    records = [record for _, record in read_records(lines_of(content), ",", max_record_bytes=50)]
    assert isinstance(records[0], RowError)
    assert records[1:] == [["x", "y"]] * 100 + [["z", "closed"]]


def test_fields_may_be_long(tmp_path: Path, read_all: Any) -> None:
    text = "word " * 100_000
    rows, errors = read_all(write(tmp_path / "a.csv", f'a,b\n1,"{text}"\n2,{text}\n'))
    assert [row["b"] for row in rows] == [text, text]
    assert errors == {}


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "x;y\n1;2\n"), ("a.csv", "x\ty\n1\t2\n"), ("a.tsv", "x\ty\n1\t2\n"), ("a.csv", "x|y\n1|2\n")],
)
def test_the_first_line_tells_the_delimiter(tmp_path: Path, read_all: Any, name: str, content: str) -> None:
    assert read_all(write(tmp_path / name, content))[0] == [{"x": "1", "y": "2"}]


def test_one_column_needs_no_delimiter(tmp_path: Path, read_all: Any) -> None:
    rows, errors = read_all(write(tmp_path / "a.csv", 'text\nfirst\n\n"second, too"\n""\n'), rows_per_split=1)
    assert [row["text"] for row in rows] == ["first", "second, too", ""]
    assert errors == {}


def test_a_mark_before_the_first_name_is_no_part_of_it(tmp_path: Path, read_all: Any) -> None:
    assert read_all(write(tmp_path / "a.csv", b"\xef\xbb\xbf\r\n\r\na,b\r\n1,2\r\n"))[0] == [{"a": "1", "b": "2"}]


def test_names_are_trimmed_and_missing_ones_made_up(tmp_path: Path, read_all: Any) -> None:
    assert read_all(write(tmp_path / "a.csv", ", body ,\n0,text,x\n"))[0] == [
        {"column_1": "0", "body": "text", "column_3": "x"}
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty; a CSV file begins with"),
        ("\n\n", "empty; a CSV file begins with"),
        ("a,a\n1,2\n", "two columns are called `a`"),
        ('"a,b\n1,2\n', "line of column names is unusable"),
        ("a,b\n", "holds no rows"),
    ],
)
def test_files_without_names_or_rows_are_the_users_to_mend(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Source.open(str(write(tmp_path / "a.csv", content)))


def test_columns_may_be_in_another_order_in_each_file_but_not_missing(tmp_path: Path, read_all: Any) -> None:
    write(tmp_path / "a.csv", "x,y\n1,2\n")
    write(tmp_path / "b.csv", "y,x,z\n2,1,3\n")
    assert read_all(tmp_path, ["x", "y"])[0] == [{"x": "1", "y": "2"}] * 2
    with pytest.raises(UserError, match=r"column 'z' is in \S+b.csv but not in \S+a.csv"):
        read_all(tmp_path, ["z"])


FIELD = st.text(st.sampled_from('a" ,\n\r\té'), max_size=6)


@settings(deadline=None)
@given(rows=st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=8), rows_per_split=st.integers(1, 4))
def test_what_python_writes_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, read_all: Any, rows: list[tuple[str, str]], rows_per_split: int
) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    path = write(tmp_path_factory.mktemp("csv") / "a.csv", text.getvalue())
    expected = [{"a": a, "b": b} for a, b in rows]
    assert read_all(path, rows_per_split=rows_per_split) == (expected, {})


@settings(max_examples=200, deadline=None)
@given(body=st.text(st.sampled_from('ab"",,\n\n\r'), max_size=40), rows_per_split=st.integers(1, 4))
def test_no_characters_end_the_reading_and_splits_agree(
    tmp_path_factory: pytest.TempPathFactory, read_all: Any, body: str, rows_per_split: int
) -> None:
    path = write(tmp_path_factory.mktemp("csv") / "a.csv", f"a,b\n0,0\n{body}\n")
    whole = read_all(path, rows_per_split=1000)
    assert whole == read_all(path, rows_per_split=rows_per_split, order=lambda splits: splits[::-1])
    assert whole[0][0] == {"a": "0", "b": "0"}
