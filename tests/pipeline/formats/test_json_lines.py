from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.formats.json_types import array_of, common_type, convert, merge, type_of
from pipeline.source import Source


def write(path: Path, *lines: bytes | str | object) -> Path:
    raw = [
        line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else json.dumps(line).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(raw))
    return path


GOOD = [{"body": f"text {i}", "n": i} for i in range(20)]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"not json", "malformed_record"),
        (b'{"body": "cut', "malformed_record"),
        (b'{"body": "a"} {"body": "b"}', "malformed_record"),
        (b"[1, 2]", "malformed_record"),
        (b"5", "malformed_record"),
        (b"null", "malformed_record"),
        (b'"text"', "malformed_record"),
        (b'{"body": 5}', "malformed_record"),
        (b'{"body": true}', "malformed_record"),
        (b'{"body": ["text"]}', "malformed_record"),
        (b'{"body": {"text": "a"}}', "malformed_record"),
        (b'{"body": "tab\tinside"}', "malformed_record"),
        (b'{"body": "nul\0inside"}', "malformed_record"),
        (b"\0\0\0", "malformed_record"),
        (b'{"n": ' + b"9" * 5000 + b"}", "malformed_record"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "malformed_record"),
        (b'{"body": "\xff\xfe"}', "not_text"),
        (b'{"body": "\xed\xa0\x80"}', "not_text"),
        (b'{"body": "lone \\ud800 surrogate"}', "not_text"),
    ],
)
def test_a_bad_record_is_an_error_of_its_row_alone(tmp_path: Path, read_all: Any, line: bytes, code: str) -> None:
    path = write(tmp_path / "bad.jsonl", *GOOD[:10], line, *GOOD[10:])
    rows, errors = read_all(path, ["body"])
    assert errors == {10: code}
    assert [row["body"] for row in rows] == [row["body"] for row in GOOD[:10]] + [None] + [
        row["body"] for row in GOOD[10:]
    ]


def test_what_is_wrong_in_columns_that_are_not_read_does_not_matter(tmp_path: Path, read_all: Any) -> None:
    path = write(
        tmp_path / "a.jsonl", *GOOD, {"body": "fine", "n": "no number"}, '{"body": "fine", "other": "\\udc00"}'
    )
    assert read_all(path, ["body"])[1] == {}
    assert read_all(path, ["body", "n", "other"])[1] == {20: "malformed_record", 21: "not_text"}


def test_a_missing_or_null_value_is_null_and_an_unknown_one_passed_over(tmp_path: Path, read_all: Any) -> None:
    path = write(tmp_path / "a.jsonl", *GOOD[:2], {"body": None}, {}, {"other": 1}, {"body": "", "n": 7})
    rows, errors = read_all(path, ["body", "n"])
    assert rows[2:] == [{"body": None, "n": None}] * 3 + [{"body": "", "n": 7}]
    assert errors == {}


def test_numbers_are_not_bent_to_fit(tmp_path: Path, read_all: Any) -> None:
    seen = [{"n": 1}] * 2000  # more are not looked at to learn the types
    rest = [{"n": 1.5}, {"n": True}, {"n": "1"}, {"n": 2**63}, {"n": -(2**63)}, {"n": 2.0}]
    rows, errors = read_all(write(tmp_path / "a.jsonl", *seen, *rest), ["n"], rows_per_split=500)
    assert errors == dict.fromkeys([2000, 2001, 2002, 2003, 2005], "malformed_record")
    assert rows[2004] == {"n": -(2**63)}


def test_whole_and_broken_numbers_go_together_where_both_are_seen_early(tmp_path: Path, read_all: Any) -> None:
    path = write(tmp_path / "a.jsonl", {"x": 1}, {"x": 2.5}, {"x": 2**60 + 1}, {"x": [1]}, {"x": 10**400}, {"x": True})
    rows, errors = read_all(path, ["x"])
    assert [row["x"] for row in rows] == [1.0, 2.5, float(2**60 + 1), None, None, None]
    assert errors == dict.fromkeys([3, 4, 5], "malformed_record")


def test_whole_numbers_that_are_too_large_for_most_are_kept_to_the_last_digit(tmp_path: Path, read_all: Any) -> None:
    numbers = [2**64 - 1, 5, -(10**37), 10**38]
    rows, errors = read_all(write(tmp_path / "a.jsonl", *[{"hash": number} for number in numbers[:3]]))
    assert [str(row["hash"]) for row in rows] == [str(number) for number in numbers[:3]]
    assert errors == {}


def test_nested_values_are_read_as_they_are(tmp_path: Path, read_all: Any) -> None:
    records = [
        {"messages": [{"role": "user", "content": "a"}], "meta": {"tags": ["x"], "more": {}}},
        {"messages": [], "meta": {"tags": [], "score": 1}},
        {"messages": [{"role": "user", "content": "b", "name": "n"}], "meta": None},
    ]
    rows, errors = read_all(write(tmp_path / "a.jsonl", *records))
    assert rows[0]["messages"] == [{"role": "user", "content": "a", "name": None}]
    assert rows[2]["messages"] == [{"role": "user", "content": "b", "name": "n"}]
    assert rows[1]["meta"]["score"] == 1
    assert errors == {}


def test_the_type_of_most_records_wins(tmp_path: Path, read_all: Any) -> None:
    path = write(tmp_path / "a.jsonl", {"x": 1}, {"x": "a"}, {"x": "b"}, {"x": {"y": 1}})
    assert read_all(path)[1] == {0: "malformed_record", 3: "malformed_record"}


def test_files_with_other_types_are_refused_in_a_line_that_names_both(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"x": 1, "y": "a"})
    write(tmp_path / "b.jsonl", {"x": "text", "y": "b"})
    source = Source.open(str(tmp_path))
    with pytest.raises(UserError, match=r"column 'x' is int64 in \S+a.jsonl but string in \S+b.jsonl"):
        list(source.read(source.splits()[0], ["x"]))
    assert [rows.batch.num_rows for split in source.splits() for rows in source.read(split, ["y"])] == [1, 1]


def test_a_column_that_a_file_does_not_show_is_null_there(tmp_path: Path, read_all: Any) -> None:
    write(tmp_path / "a.jsonl", {"x": 1})
    write(tmp_path / "b.jsonl", {"y": "b"}, {"x": 3, "y": None})
    rows, errors = read_all(tmp_path)
    assert rows == [{"x": 1, "y": None}, {"x": None, "y": "b"}, {"x": 3, "y": None}]
    assert errors == {}


@pytest.mark.parametrize("blank", [b"", b" ", b"\r", b"\t  \r", b" " * 100])
def test_blank_lines_are_no_records(tmp_path: Path, read_all: Any, blank: bytes) -> None:
    path = write(tmp_path / "a.jsonl", blank, GOOD[0], blank, blank, GOOD[1], blank)
    assert read_all(path)[0] == GOOD[:2]


def test_a_json_array_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD, indent=1))
    with pytest.raises(UserError, match="JSON array"):
        Source.open(str(path))


def test_utf16_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"body": "a"}\n'.encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16"):
        Source.open(str(path))


def test_a_file_without_one_readable_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no record in it could be read"):
        Source.open(str(write(tmp_path / "a.jsonl", b"nothing", b"here")))


def test_a_damaged_compressed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"body": "a"}\n' * 10_000)[:-30])
    with pytest.raises(UserError, match=r"a.jsonl.gz: can't be read"):
        Source.open(str(path))
    path.write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"a.jsonl.gz: can't be read"):
        Source.open(str(path))


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=[]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(JSON_VALUES, min_size=1, max_size=6))
def test_a_column_of_any_values_is_read_and_keeps_what_fits(values: list[object]) -> None:
    from collections import Counter

    kind = common_type(Counter(map(type_of, values)))
    errors: dict[int, Any] = {}
    array = array_of(values, pa.field("x", kind), errors)
    array.validate(full=True)
    assert len(array) == len(values)
    for offset, value in enumerate(values):
        if offset in errors:
            assert not array[offset].is_valid
        elif isinstance(value, str | bool | int | float):
            assert array[offset].as_py() == (float(value) if kind == pa.float64() else value)


@given(JSON_VALUES, JSON_VALUES)
def test_the_merged_type_of_two_values_holds_both(one: object, other: object) -> None:
    kind = merge(type_of(one), type_of(other))
    if kind is not None:
        for value in (one, other):
            try:
                convert(value, kind)
            except UnicodeEncodeError:
                pass  # its lone surrogate, not its type
            except ValueError:
                assert _holds_conflict(value)


def _holds_conflict(value: object) -> bool:
    """Whether a list in the value has items that don't go together, or a number that no float holds."""
    if isinstance(value, list):
        kinds = [type_of(item) for item in value]
        common: pa.DataType | None = pa.null()
        for kind in kinds:
            common = merge(common, kind) if common is not None else None
        return common is None or any(map(_holds_conflict, value))
    if isinstance(value, dict):
        return any(map(_holds_conflict, value.values()))
    return False


LINE = st.one_of(
    st.dictionaries(st.sampled_from(["body", "n"]), JSON_VALUES, max_size=2).map(
        lambda value: json.dumps(value).encode()
    ),
    st.binary(max_size=12),
    st.sampled_from([b"", b" ", b"\r", b'{"body":"x"}', b'{"body":"\\ud800"}', b"\xef\xbb\xbf"]),
)


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(LINE, max_size=12), rows_per_split=st.integers(1, 5))
def test_rows_of_any_bytes_are_those_of_its_lines(
    tmp_path_factory: pytest.TempPathFactory, read_all: Any, lines: list[bytes], rows_per_split: int
) -> None:
    content = b"\n".join([*lines, b'{"body": "last", "n": 1}'])
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    path.write_bytes(content)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or content.lstrip(b"\xef\xbb\xbf \t\r\n\v\f").startswith(b"["):
        return
    expected = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    rows, errors = read_all(path, rows_per_split=rows_per_split)
    assert len(rows) == len(expected)
    for row, line in enumerate(expected):
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError):
            assert row in errors
        else:
            assert isinstance(value, dict) or row in errors
    assert read_all(path, rows_per_split=rows_per_split, order=lambda splits: splits[::-1]) == (rows, errors)
