"""What holds for all formats alike."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from pipeline.source import Source, Split, auto_rows_per_split

NUM_ROWS = 500
TABLE = pa.table(
    {
        "number": list(range(NUM_ROWS)),
        "body": [f"row {i} é\U0001f600 " + "x" * (i % 50) for i in range(NUM_ROWS)],
        "kind": pa.array([("odd", "even")[i % 2] for i in range(NUM_ROWS)]).dictionary_encode(),
    }
)
ROWS = TABLE.to_pylist()
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ONLY_TEXT = [{"text": row["body"]} for row in ROWS]


def parquet(path: Path) -> None:
    pq.write_table(TABLE, path, row_group_size=90)


def feather(path: Path) -> None:
    pyarrow.feather.write_feather(TABLE, path, chunksize=110, compression="lz4")


def arrow_file(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=130)


def arrow_stream(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=60)


def delimited(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(TABLE.column_names)
        writer.writerows(row.values() for row in ROWS)


def zstandard(path: Path) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(JSON_LINES)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "data.parquet": parquet,
    "data.feather": feather,
    "data.arrow": arrow_file,
    "data.arrows": arrow_stream,
    "data.jsonl": lambda path: path.write_bytes(JSON_LINES),
    "data.ndjson": lambda path: path.write_bytes(b"\xef\xbb\xbf\r\n" + JSON_LINES.replace(b"\n", b"\r\n\n")),
    "data.jsonl.gz": lambda path: path.write_bytes(gzip.compress(JSON_LINES)),
    "data.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(JSON_LINES)),
    "data.jsonl.zst": zstandard,
    "data.csv": delimited,
    "data.tsv": delimited,
    "data.txt": lambda path: path.write_text("\n\n".join(row["body"] for row in ROWS), encoding="utf-8"),
}


@pytest.fixture(scope="module", params=list(WRITERS))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / request.param
    WRITERS[request.param](path)
    return path


def expected(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".txt":
        return ONLY_TEXT
    if path.suffix in (".csv", ".tsv"):
        return [row | {"number": str(row["number"])} for row in ROWS]
    return ROWS


def shuffled(splits: list[Split]) -> list[Split]:
    return random.Random(0).sample(splits, len(splits))


@pytest.mark.parametrize("order", [list, lambda splits: splits[::-1], lambda s: s[::2] + s[1::2], shuffled])
@pytest.mark.parametrize("rows_per_split", [1000, 64, 7])
def test_rows_come_out_whole_and_in_place_whatever_the_order_of_splits(
    path: Path, read_all: Any, rows_per_split: int, order: Any
) -> None:
    rows, errors = read_all(path, rows_per_split=rows_per_split, order=order)
    assert rows == expected(path)
    assert errors == {}


def test_small_batches_hold_the_same_rows(path: Path, read_all: Any) -> None:
    rows, _ = read_all(path, rows_per_split=200, max_bytes=500)
    assert rows == expected(path)


def test_batches_keep_to_their_size(path: Path) -> None:
    source = Source.open(str(path))
    for split in source.splits(300):
        for rows in source.read(split, source.schema.names, max_bytes=2000):
            assert rows.batch.get_total_buffer_size() < 6000  # the bound, and Arrow's own padding


def test_columns_come_as_asked_for_and_in_that_order(path: Path) -> None:
    source = Source.open(str(path))
    names = source.schema.names[::-1]
    batch = next(source.read(source.splits()[0], names)).batch
    assert batch.schema.names == names
    assert batch.schema == source.columns.select(names)


def test_without_a_column_rows_are_still_counted(path: Path) -> None:
    source = Source.open(str(path))
    assert sum(rows.batch.num_rows for split in source.splits(64) for rows in source.read(split, [])) == NUM_ROWS


def test_splits_cover_each_row_once_and_are_the_same_each_time(path: Path) -> None:
    splits = Source.open(str(path)).splits(64)
    assert splits == Source.open(str(path)).splits(64)
    assert [split.index for split in splits] == list(range(len(splits)))
    assert [split.first_row for split in splits] == list(range(0, NUM_ROWS, 64))
    assert sum(split.num_rows for split in splits) == NUM_ROWS


def test_reading_can_stop_early_and_go_on_elsewhere(path: Path) -> None:
    source = Source.open(str(path))
    splits = source.splits(50)
    names = source.schema.names
    next(source.read(splits[0], names, max_bytes=100))
    halfway = source.read(splits[1], names, max_bytes=1000)
    next(halfway)
    for split in splits[2:4]:
        assert sum(rows.batch.num_rows for rows in source.read(split, names)) == 50
    rest = [row for rows in halfway for row in rows.batch.to_pylist()]
    assert rest == expected(path)[100 - len(rest) : 100]


def test_several_threads_may_read_from_one_source(path: Path) -> None:
    source = Source.open(str(path))
    names = source.schema.names
    splits = source.splits(20)

    def read(mine: list[Split]) -> dict[int, list[Any]]:
        return {s.index: [row for rows in source.read(s, names) for row in rows.batch.to_pylist()] for s in mine}

    with ThreadPoolExecutor(3) as threads:
        found = {
            index: rows for part in threads.map(read, [splits[i::3] for i in range(3)]) for index, rows in part.items()
        }
    assert [row for index in sorted(found) for row in found[index]] == expected(path)


def test_automatic_splits_depend_on_the_number_of_rows_alone() -> None:
    assert [auto_rows_per_split(n) for n in (1, 400, 20_000, 2_000_000, 10**9)] == [64, 64, 256, 4096, 65536]


def test_batches_do_not_keep_files_or_memory_of_the_cursor(path: Path) -> None:
    source = Source.open(str(path))
    batches = [rows.batch for split in source.splits(50) for rows in source.read(split, source.schema.names)]
    source.close()
    path_copy = io.BytesIO(path.read_bytes())
    path.write_bytes(b"")  # whoever still looks at a map of the file would not survive this
    try:
        assert [row for batch in batches for row in batch.to_pylist()] == expected(path)
    finally:
        path.write_bytes(path_copy.getvalue())
