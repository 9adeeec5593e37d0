from __future__ import annotations

from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipeline.columns import conform, holds_text, plain_field, plain_type
from pipeline.python_values import values_of

RAW = st.lists(
    st.none() | st.sampled_from([b"", b"a", "é".encode(), b"\xff", b"\xed\xa0\x80", b"text"]), min_size=1, max_size=8
)


def text_of(raw: list[bytes | None], *, large: bool = False) -> Any:
    """A string array over bytes that may be no text."""
    array = pa.array(raw, pa.large_binary() if large else pa.binary())
    return pa.Array.from_buffers(pa.large_string() if large else pa.string(), len(raw), array.buffers())


def is_text(raw: bytes | None) -> bool:
    try:
        return raw is None or raw.decode() is not None
    except UnicodeDecodeError:
        return False


@given(RAW, st.sampled_from(["string", "large", "dictionary", "list", "struct", "list of structs", "large list"]))
def test_text_that_is_none_is_found_wherever_it_lies(raw: list[bytes | None], shape: str) -> None:
    text = text_of(raw)
    offsets = pa.array(range(len(raw) + 1), pa.int32())
    shapes: dict[str, Any] = {
        "string": text,
        "large": text_of(raw, large=True),
        "dictionary": pa.DictionaryArray.from_arrays(pa.array(range(len(raw))), text),
        "list": pa.ListArray.from_arrays(offsets, text),
        "large list": pa.LargeListArray.from_arrays(pa.array(range(len(raw) + 1)), text),
        "struct": pa.StructArray.from_arrays([text], ["x"]),
        "list of structs": pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays([text], ["x"])),
    }
    array = shapes[shape]
    for start in (0, len(raw) // 2):
        batch = pa.RecordBatch.from_arrays([array], names=["t"]).slice(start)
        chunk = conform(batch, pa.schema([plain_field(field) for field in batch.schema]))
        chunk.batch.validate(full=True)
        assert {offset: error.code for offset, error in chunk.errors.items()} == {
            offset: "not_text" for offset, one in enumerate(raw[start:]) if not is_text(one)
        }
        wanted = [one.decode() if one is not None and is_text(one) else None for one in raw[start:]]
        values = chunk.batch.column("t").to_pylist()
        for offset, (value, text_wanted) in enumerate(zip(values, wanted, strict=True)):
            while isinstance(value, list | dict):
                (value,) = value if isinstance(value, list) else value.values()
            assert value == text_wanted, offset


def test_plain_types_hold_no_encodings() -> None:
    kind = pa.struct(
        [
            pa.field(
                "a", pa.large_list(pa.field("element", pa.dictionary(pa.int8(), pa.large_string()))), nullable=False
            ),
            pa.field("b", pa.map_(pa.large_string(), pa.string_view())),
            pa.field("c", pa.list_(pa.large_binary(), 2)),
            pa.field("d", pa.run_end_encoded(pa.int32(), pa.int64())),
        ]
    )
    plain = plain_type(kind)
    assert plain == pa.struct(
        [
            ("a", pa.list_(pa.string())),
            ("b", pa.map_(pa.string(), pa.string())),
            ("c", pa.list_(pa.binary(), 2)),
            ("d", pa.int64()),
        ]
    )
    assert plain_type(plain) == plain
    assert holds_text(plain)
    assert not holds_text(pa.struct([("x", pa.list_(pa.int8()))]))


def test_numbers_that_do_not_fit_cost_their_row() -> None:
    batch = pa.RecordBatch.from_arrays([pa.array([1, 2**40, None])], names=["n"])
    chunk = conform(batch, pa.schema([("n", pa.int32())]))
    assert chunk.batch.column("n").to_pylist() == [1, None, None]
    assert {offset: error.code for offset, error in chunk.errors.items()} == {1: "malformed_record"}


class TestPythonValues:
    def test_nanoseconds_are_cut(self) -> None:
        for kind in (pa.timestamp("ns"), pa.timestamp("ns", "UTC"), pa.time64("ns"), pa.duration("ns")):
            (value,) = values_of(pa.array([1_234_567_891], pa.int64()).cast(kind), "t", {})
            assert type(value).__module__ == "datetime"
            assert value.microsecond == 234567 if hasattr(value, "microsecond") else value.microseconds == 234567

    def test_nanoseconds_inside_of_others_are_cut(self) -> None:
        moment = pa.array([1_234_567_891], pa.int64()).cast(pa.timestamp("ns"))
        lists = pa.ListArray.from_arrays([0, 1], pa.StructArray.from_arrays([moment], names=["at"]))
        ((value,),) = values_of(lists, "t", {})
        assert value["at"].microsecond == 234567

    def test_times_past_pythons_cost_their_row(self) -> None:
        errors: dict[int, Any] = {}
        array = pa.array([0, 2**60, None], pa.int64()).cast(pa.timestamp("s"))
        values = values_of(array, "t", errors)
        assert values[1:] == [None, None]
        assert values[0].year == 1970
        assert [(offset, error.code) for offset, error in errors.items()] == [(1, "malformed_record")]
