from __future__ import annotations

import datetime
import decimal
import hashlib
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import JobError, UserError
from pipeline.formats import parquet
from pipeline.source import Source


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def largest_batch(path: Path, columns: list[str], max_bytes: int) -> int:
    source = Source.open(str(path))
    before = pa.total_allocated_bytes()
    peak = 0
    for split in source.splits(4096):
        for rows in source.read(split, columns, max_bytes=max_bytes):
            peak = max(peak, pa.total_allocated_bytes() - before)
            assert rows.batch.nbytes <= max_bytes or rows.batch.num_rows == 1
            del rows
    source.close()
    return peak


class TestSmallFilesThatDecodeToMuch:
    LONG = 1 << 18

    @pytest.mark.parametrize("encoding", ["dictionary", "delta"])
    def test_one_long_value_named_by_many_rows(self, tmp_path: Path, encoding: str) -> None:
        options: dict[str, Any] = {"use_dictionary": True}
        if encoding == "delta":
            options = {"use_dictionary": False, "column_encoding": {"t": "DELTA_BYTE_ARRAY"}}
        path = write(tmp_path / "bomb.parquet", {"t": ["x" * self.LONG] * 200}, compression="zstd", **options)
        assert path.stat().st_size < 2000
        assert largest_batch(path, ["t"], 8 * self.LONG) < 40 * self.LONG

    def test_a_long_value_after_many_short_ones(self, tmp_path: Path) -> None:
        texts = [f"short {i}" for i in range(20_000)] + ["y" * self.LONG] * 200
        path = write(tmp_path / "bomb.parquet", {"t": texts}, compression="zstd")
        assert path.stat().st_size < 500_000
        assert largest_batch(path, ["t"], 8 * self.LONG) < 40 * self.LONG

    def test_columns_that_come_back_as_dictionaries(self, tmp_path: Path) -> None:
        values = pa.DictionaryArray.from_arrays(pa.array([0] * 200), pa.array(["z" * self.LONG]))
        path = write(tmp_path / "bomb.parquet", {"t": values}, compression="zstd")
        assert largest_batch(path, ["t"], 8 * self.LONG) < 40 * self.LONG

    def test_long_values_in_lists(self, tmp_path: Path) -> None:
        path = write(tmp_path / "bomb.parquet", {"t": [["x" * (self.LONG // 8)] * 8] * 100}, compression="zstd")
        assert largest_batch(path, ["t"], 8 * self.LONG) < 60 * self.LONG

    def test_other_columns_do_not_count(self, tmp_path: Path) -> None:
        path = write(tmp_path / "bomb.parquet", {"t": ["x" * self.LONG] * 50, "n": list(range(50))})
        source = Source.open(str(path))
        (rows,) = source.read(source.splits(50)[0], ["n"], max_bytes=self.LONG)
        assert rows.batch.num_rows == 50


def test_a_row_group_is_decoded_once_however_many_splits_it_has(tmp_path: Path, monkeypatch: Any) -> None:
    path = write(tmp_path / "one.parquet", {"t": [f"row {i}" for i in range(20_000)]}, row_group_size=20_000)
    opened = []
    plain_open = parquet.ParquetCursor._open_group
    monkeypatch.setattr(
        parquet.ParquetCursor, "_open_group", lambda self, group: (opened.append(group), plain_open(self, group))[1]
    )
    source = Source.open(str(path))
    splits = source.splits(100)
    for split in [*splits[:100:2], *splits[101::2]]:  # as where another worker takes the ones between
        assert sum(rows.batch.num_rows for rows in source.read(split, ["t"])) == 100
    assert opened == [0]


def test_two_splits_may_be_read_side_by_side(tmp_path: Path) -> None:
    path = write(tmp_path / "one.parquet", {"n": list(range(1000))}, row_group_size=300)
    source = Source.open(str(path))
    one, other = source.splits(500)
    numbers = []
    turns = zip_longest(source.read(one, ["n"], max_bytes=800), source.read(other, ["n"], max_bytes=800))
    for rows in chain.from_iterable(turns):
        numbers += rows.batch.column("n").to_pylist() if rows is not None else []
    assert sorted(numbers) == list(range(1000))


def test_every_encoding_of_text_is_string(tmp_path: Path, read_all: Any) -> None:
    texts = ["a", None, "ü"]
    path = write(
        tmp_path / "text.parquet",
        {
            "plain": texts,
            "large": pa.array(texts, pa.large_string()),
            "view": pa.array(texts, pa.string_view()),
            "dictionary": pa.array(texts).dictionary_encode(),
            "nested": pa.array([[text] for text in texts], pa.large_list(pa.large_string())),
            "in struct": pa.array([{"x": text} for text in texts], pa.struct([("x", pa.large_string())])),
        },
    )
    kinds = dict(zip((schema := Source.open(str(path)).schema).names, schema.types, strict=True))
    assert {kinds[name] for name in ("plain", "large", "view", "dictionary")} == {pa.string()}
    assert kinds["nested"] == pa.list_(pa.string())
    rows, errors = read_all(path)
    assert (
        [row["large"] for row in rows] == [row["view"] for row in rows] == [row["dictionary"] for row in rows] == texts
    )
    assert [row["nested"] for row in rows] == [[text] for text in texts]
    assert errors == {}


def test_values_of_other_types_survive(tmp_path: Path, read_all: Any) -> None:
    columns = {
        "when": pa.array([datetime.datetime(2024, 1, 2, 3, 4, 5), None], pa.timestamp("us", "UTC")),
        "day": pa.array([datetime.date(1, 1, 1), datetime.date(9999, 12, 31)]),
        "price": pa.array([decimal.Decimal("1.10"), None], pa.decimal128(20, 2)),
        "vector": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2)),
        "tags": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
        "raw": [b"\xff\x00", None],
        "a.b": [1, 2],
        "nothing": pa.nulls(2),
    }
    path = write(tmp_path / "types.parquet", columns)
    rows, errors = read_all(path)
    assert rows == pq.read_table(path).to_pylist()
    assert errors == {}


def test_bytes_that_are_no_utf8_cost_their_row(tmp_path: Path, read_all: Any) -> None:
    raw = [b"good", b"\xff\xfe", None, "é".encode(), b"\xed\xa0\x80", b"also good"]
    plain = pa.Array.from_buffers(pa.string(), len(raw), pa.array(raw, pa.binary()).buffers())
    lists = pa.ListArray.from_arrays(pa.array(range(len(raw) + 1), pa.int32()), plain)
    path = write(tmp_path / "bad.parquet", {"plain": plain, "lists": lists, "n": list(range(len(raw)))})
    for column in ("plain", "lists"):
        rows, errors = read_all(path, [column, "n"], rows_per_split=4)
        assert errors == {1: "not_text", 4: "not_text"}
        assert [row["n"] for row in rows] == list(range(len(raw)))
        texts = ["good", None, None, "é", None, "also good"]
        assert [row[column] for row in rows] == (
            texts if column == "plain" else [None if i in errors else [text] for i, text in enumerate(texts)]
        )
    assert read_all(path, ["n"])[1] == {}


def test_a_damaged_page_costs_the_rows_behind_it_in_its_row_group(tmp_path: Path, read_all: Any) -> None:
    texts = [hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() * 2 for i in range(3000)]
    path = write(
        tmp_path / "damaged.parquet",
        {"t": texts},
        row_group_size=1000,
        use_dictionary=False,
        data_page_size=10_000,
        write_batch_size=50,
        compression="snappy",
    )
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    middle = group.data_page_offset + group.total_compressed_size // 2
    content[middle : middle + 1000] = b"\xff" * 1000
    path.write_bytes(content)
    rows, errors = read_all(path, rows_per_split=300)
    assert set(errors.values()) == {"malformed_record"}
    assert min(errors) > 1000
    assert sorted(errors) == list(range(min(errors), 2000))
    assert [row["t"] for i, row in enumerate(rows) if i not in errors] == [
        text for i, text in enumerate(texts) if i not in errors
    ]
    assert read_all(path, rows_per_split=300, order=lambda splits: splits[::-1]) == (rows, errors)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1", b"no parquet at all"])
def test_a_file_that_is_no_parquet_is_the_users_to_mend(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.parquet"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad.parquet: not a readable Parquet file") as caught:
        Source.open(str(path))
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_the_users_to_mend(tmp_path: Path) -> None:
    path = write(tmp_path / "cut.parquet", {"t": ["text"] * 1000})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cut.parquet: not a readable Parquet file"):
        Source.open(str(path))


def test_empty_row_groups_and_files_are_passed_over(tmp_path: Path, read_all: Any) -> None:
    schema = pa.schema([("t", pa.string())])
    with pq.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        for texts in (["a", "b"], [], ["c"], []):
            writer.write_table(pa.table({"t": pa.array(texts, pa.string())}))
    write(tmp_path / "b.parquet", {"t": pa.array([], pa.string())})
    write(tmp_path / "c.parquet", {"t": ["d"]})
    rows, _ = read_all(tmp_path, rows_per_split=2)
    assert [row["t"] for row in rows] == ["a", "b", "c", "d"]


def test_a_file_that_changed_its_rows_is_noticed_when_it_is_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", {"t": ["a", "b"]})
    source = Source.open(str(path))
    write(path, {"t": ["a", "b", "c"]})
    with pytest.raises(JobError, match=r"t.parquet has changed since the job was planned"):
        list(source.read(source.splits(2)[0], ["t"]))
