"""Arrow columns -> the Python values that templates see."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipeline.errors import RowError


def values_of(array: pa.Array[Any], name: str, errors: dict[int, RowError]) -> list[Any]:
    """The values; binary ones as text. What can't be had becomes None, and an entry in `errors`.

    Nanoseconds are cut to the microseconds that Python's own types have, whether or not pandas is installed.
    """
    kind: Any = array.type
    if pa.types.is_binary(kind):
        try:
            return array.cast(pa.string()).to_pylist()
        except pa.ArrowInvalid:
            return [_decoded(value, offset, name, errors) for offset, value in enumerate(array.to_pylist())]
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        array = array.cast(pa.timestamp("us", kind.tz), safe=False)
    elif pa.types.is_duration(kind) and kind.unit == "ns":
        array = array.cast(pa.duration("us"), safe=False)
    elif pa.types.is_time64(kind) and kind.unit == "ns":
        array = array.cast(pa.time64("us"), safe=False)
    try:
        return array.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        return [_value(array, offset, name, errors) for offset in range(len(array))]


def _decoded(value: bytes | None, offset: int, name: str, errors: dict[int, RowError]) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        errors.setdefault(offset, RowError("not_text", f"column `{name}` is no valid UTF-8"))
        return None


def _value(array: pa.Array[Any], offset: int, name: str, errors: dict[int, RowError]) -> Any:
    try:
        return array[offset].as_py()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        errors.setdefault(offset, RowError("malformed_record", f"column `{name}` holds no usable value ({error})"))
        return None
