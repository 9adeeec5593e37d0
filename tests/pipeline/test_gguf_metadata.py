"""GGUF headers, against the gguf package that writes them."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.gguf_metadata import read_gguf_metadata


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("t.u8", 200)
    writer.add_int8("t.i8", -100)
    writer.add_uint16("t.u16", 60_000)
    writer.add_int16("t.i16", -30_000)
    writer.add_uint32("t.u32", 4_000_000_000)
    writer.add_int32("t.i32", -2_000_000_000)
    writer.add_uint64("t.u64", 2**63)
    writer.add_int64("t.i64", -(2**62))
    writer.add_float32("t.f32", 0.5)
    writer.add_float64("t.f64", 0.1)
    writer.add_bool("t.bool", True)
    writer.add_string("t.text", "Größe 😀\n")
    writer.add_array("t.texts", ["a", "b", "é"])
    writer.add_array("t.ints", [1, -2, 3])
    writer.add_array("t.floats", [0.5, -1.0])
    writer.add_array("t.bools", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_values_are_those_that_the_gguf_package_reads(written: Path) -> None:
    theirs = {
        key: field.contents() for key, field in gguf.GGUFReader(written).fields.items() if not key.startswith("GGUF.")
    }
    assert read_gguf_metadata(written) == theirs
    assert list(read_gguf_metadata(written)) == list(theirs)


def test_only_keys_with_the_prefix_are_read(written: Path) -> None:
    assert read_gguf_metadata(written, prefix="general.") == {"general.architecture": "llama"}
    assert list(read_gguf_metadata(written, prefix=("general.", "t.texts"))) == ["general.architecture", "t.texts"]
    assert list(read_gguf_metadata(written, prefix="t.bools")) == ["t.bools"]  # the last: all before were passed over


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_refused_with_one_line_or_read(data: st.DataObject, written: Path) -> None:
    content = bytearray(written.read_bytes())
    damaged = written.with_name("damaged.gguf")
    if data.draw(st.booleans(), label="cut"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged.write_bytes(content)
    for prefix in ("", "none."):
        refusal = ""
        try:
            read_gguf_metadata(damaged, prefix=prefix)
        except UserError as error:
            refusal = str(error)
        assert not refusal or (refusal.startswith(str(damaged)) and "\n" not in refusal)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "can't be read as GGUF"),
        (b"PK\x03\x04 something else", "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(16), "GGUF version 1 is not supported"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 5), "truncated GGUF file"),
        (b"GGUF" + struct.pack("<IQQQ1sIB", 3, 0, 1, 1, b"k", 77, 0), "'k' has the unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "array of the unknown type 9"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**60), "truncated GGUF file"),
        (b"GGUF" + struct.pack("<IQQQ1s", 3, 0, 1, 1, b"\xff"), "is not UTF-8"),
    ],
)
def test_what_is_not_whole_gguf_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_gguf_metadata(tmp_path / "x.gguf")


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_gguf_metadata(tmp_path / "none.gguf")
