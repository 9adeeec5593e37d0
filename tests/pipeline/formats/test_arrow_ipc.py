from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.feather
import pytest

from pipeline.errors import UserError
from pipeline.formats.arrow_ipc import _largest_shared
from pipeline.source import Source


def write(path: Path, columns: dict[str, Any], *, stream: bool = False, compression: str | None = None) -> Path:
    table = pa.table(columns)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, make(file, table.schema, options=options) as writer:
        writer.write_table(table)
    return path


TEXTS = ["a", None, "ü", "a"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_every_encoding_of_text_is_string(tmp_path: Path, read_all: Any, stream: bool, compression: str | None) -> None:
    columns = {
        "plain": TEXTS,
        "large": pa.array(TEXTS, pa.large_string()),
        "view": pa.array(TEXTS, pa.string_view()),
        "dictionary": pa.array(TEXTS).dictionary_encode(),
        "runs": pa.RunEndEncodedArray.from_arrays([1, 2, 4], ["a", None, "ü"]),
        "nested": pa.array([[text] for text in TEXTS], pa.list_(pa.string_view())),
    }
    path = write(tmp_path / "a.arrow", columns, stream=stream, compression=compression)
    assert set(Source.open(str(path)).schema.types[:-1]) == {pa.string()}
    rows, errors = read_all(path, rows_per_split=3)
    for name in ("plain", "large", "view", "dictionary"):
        assert [row[name] for row in rows] == TEXTS
    assert [row["runs"] for row in rows] == ["a", None, "ü", "ü"]
    assert [row["nested"] for row in rows] == [[text] for text in TEXTS]
    assert errors == {}


def test_bytes_that_are_no_utf8_cost_their_row(tmp_path: Path, read_all: Any) -> None:
    raw = pa.array([b"good", b"\xff", None, b"fine"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    dictionary = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 3]), text)
    rows, errors = read_all(write(tmp_path / "a.arrow", {"t": text, "d": dictionary}))
    assert [row["t"] for row in rows] == [row["d"] for row in rows] == ["good", None, None, "fine"]
    assert errors == {1: "not_text"}


def _views_of(text: str, num_rows: int) -> Any:
    """An array whose rows are all views of the same text."""
    view = struct.pack("<i4sii", len(text), text[:4].encode(), 0, 0)
    buffers = [None, pa.py_buffer(view * num_rows), pa.py_buffer(text.encode())]
    return pa.Array.from_buffers(pa.string_view(), num_rows, buffers)


@pytest.mark.parametrize("kind", ["dictionary", "view", "runs", "in struct", "in list"])
def test_what_rows_share_is_counted_for_each_of_them(tmp_path: Path, kind: str) -> None:
    text = "x" * (1 << 18)
    shared: dict[str, Any] = {
        "dictionary": pa.DictionaryArray.from_arrays(pa.array([0] * 200), pa.array([text])),
        "runs": pa.RunEndEncodedArray.from_arrays(pa.array([200], pa.int32()), pa.array([text])),
        "view": _views_of(text, 200),
    }
    shared["in struct"] = pa.StructArray.from_arrays([shared["dictionary"]], ["x"])
    shared["in list"] = pa.ListArray.from_arrays(pa.array(range(0, 201, 2), pa.int32()), shared["dictionary"])
    path = write(tmp_path / "a.arrow", {"t": shared[kind]})
    assert path.stat().st_size < 400_000
    source = Source.open(str(path))
    before, peak = pa.total_allocated_bytes(), 0
    for rows in source.read(source.splits(200)[0], ["t"], max_bytes=1 << 20):
        peak = max(peak, pa.total_allocated_bytes() - before)
        del rows
    assert peak < 8 << 20


def test_the_largest_shared_value_of_a_slice_is_that_of_the_slice() -> None:
    views = pa.array(["x" * 100, "y" * 50, "z" * 20]).cast(pa.string_view())
    assert _largest_shared(views) == 100
    assert _largest_shared(views.slice(1)) == 50
    assert _largest_shared(pa.array(["x" * 100])) == 0


def test_memory_stays_the_same_while_a_large_record_batch_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "large.arrow", {"t": [f"{i:0200}" for i in range(300_000)]})  # 60 MB in one batch
    source = Source.open(str(path))
    splits = source.splits(4096)
    list(source.read(splits[0], ["t"]))
    before = psutil.Process().memory_info().rss
    for split in splits:
        for rows in source.read(split, ["t"], max_bytes=1 << 20):
            del rows
    assert psutil.Process().memory_info().rss - before < 25 << 20


@pytest.mark.parametrize("content", [b"", b"ARROW1", b"ARROW1\0\0" + b"x" * 50, b"nothing like it" * 10])
def test_a_file_that_is_no_arrow_is_the_users_to_mend(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.arrow"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a.arrow: not a readable Arrow IPC file"):
        Source.open(str(path))


def test_a_cut_file_is_the_users_to_mend(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", {"t": ["text"] * 100})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"a.arrow: not a readable Arrow IPC file"):
        Source.open(str(path))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_old_feather_format_is_refused_with_the_way_out(tmp_path: Path) -> None:
    pyarrow.feather.write_feather(pa.table({"n": [1]}), tmp_path / "a.feather", version=1)
    with pytest.raises(UserError, match="Feather version 1"):
        Source.open(str(tmp_path / "a.feather"))
