"""Arrow columns -> the Python values that templates see."""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa

from pipeline.errors import RowError

UNREADABLE: Final = (ValueError, OverflowError, pa.ArrowException)  # what a value that Python can't hold raises


def values_of(array: pa.Array[Any], name: str, errors: dict[int, RowError]) -> list[Any]:
    """The values; binary ones as text. What can't be had becomes None, and an entry in `errors`.

    Nanoseconds are cut to the microseconds that Python's own types have, whether or not pandas is installed.
    """
    if pa.types.is_binary(array.type):
        try:
            return array.cast(pa.string()).to_pylist()
        except pa.ArrowInvalid:
            return [_decoded(value, offset, name, errors) for offset, value in enumerate(array.to_pylist())]
    array = in_microseconds(array)
    try:
        return array.to_pylist()
    except UNREADABLE:
        return [_value(array, offset, name, errors) for offset in range(len(array))]


def in_microseconds(array: Any) -> Any:
    """An array or chunked array whose nanoseconds, also those inside of lists and the like, are cut to microseconds."""
    kind = _in_microseconds(array.type)
    return array if kind.equals(array.type) else array.cast(kind, safe=False)


def _in_microseconds(kind: Any) -> Any:
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if pa.types.is_time64(kind) and kind.unit == "ns":
        return pa.time64("us")
    if pa.types.is_list(kind):
        return pa.list_(_field_in_microseconds(kind.value_field))
    if pa.types.is_large_list(kind):
        return pa.large_list(_field_in_microseconds(kind.value_field))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_field_in_microseconds(kind.value_field), kind.list_size)
    if pa.types.is_struct(kind):
        return pa.struct([_field_in_microseconds(field) for field in kind])
    if pa.types.is_map(kind):
        map_of: Any = pa.map_  # its type stubs know no fields of it
        return map_of(*map(_field_in_microseconds, (kind.key_field, kind.item_field)), kind.keys_sorted)
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _in_microseconds(kind.value_type), kind.ordered)
    return kind


def _field_in_microseconds(field: pa.Field[Any]) -> pa.Field[Any]:
    return field.with_type(_in_microseconds(field.type))


def _decoded(value: bytes | None, offset: int, name: str, errors: dict[int, RowError]) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        errors.setdefault(offset, RowError("not_text", f"column `{name}` is no valid UTF-8"))
        return None


def _value(array: pa.Array[Any], offset: int, name: str, errors: dict[int, RowError]) -> Any:
    try:
        return array[offset].as_py()
    except UNREADABLE as error:
        errors.setdefault(offset, RowError("malformed_record", f"column `{name}` holds no usable value ({error})"))
        return None
