"""Arrow types for JSON values: learnt from a sample, then held to strictly, value by value.

pyarrow's own conversion is no judge here: it reads 1.5 as 1 into int64, True as 1.0 into double, and infers `string`
from ["a", 1].
"""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import Any

import pyarrow as pa

from pipeline.errors import RowError

_INT64 = range(-(1 << 63), 1 << 63)
_LARGE = pa.decimal128(38, 0)  # whole numbers past int64: hashes, as a rule
_LARGE_END = 10**38
_NUMBERS = (pa.int64(), _LARGE, pa.float64())  # each holds those before it


def common_type(kinds: Counter[pa.DataType]) -> pa.DataType:
    """The type that most values have, widened to as many others as can be told apart no more.

    >>> common_type(Counter({pa.string(): 2, pa.int64(): 1}))
    DataType(string)
    >>> common_type(Counter({pa.int64(): 2, pa.float64(): 1}))
    DataType(double)
    """
    common: pa.DataType = pa.null()
    for kind, _ in kinds.most_common():
        common = merge(common, kind) or common
    return common


def type_of(value: object) -> pa.DataType:
    """The narrowest type that holds a JSON value."""
    if value is None:
        return pa.null()
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        return pa.int64() if value in _INT64 else _LARGE if abs(value) < _LARGE_END else pa.float64()
    if isinstance(value, float):
        return pa.float64()
    if isinstance(value, str):
        return pa.string()
    if isinstance(value, list):
        return pa.list_(common_type(Counter(map(type_of, value))))
    assert isinstance(value, dict), type(value)
    if not value:
        return pa.null()  # Parquet has no structs without fields
    return pa.struct([pa.field(name, type_of(inner)) for name, inner in value.items()])


def merge(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds values of both, None if there is none."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if one in _NUMBERS and other in _NUMBERS:
        return max(one, other, key=_NUMBERS.index)
    if pa.types.is_list(one) and pa.types.is_list(other):
        items = merge(one.value_type, other.value_type)
        return None if items is None else pa.list_(items)
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        kinds = {field.name: field.type for field in one}
        for field in other:
            merged = merge(kinds.get(field.name, pa.null()), field.type)
            if merged is None:
                return None
            kinds[field.name] = merged
        return pa.struct([pa.field(name, kind) for name, kind in kinds.items()])
    return None


def convert(value: object, kind: pa.DataType) -> object:
    """The value as pyarrow is to be given it; ValueError if storing it in the type would lose something.

    UnicodeEncodeError, a ValueError too, means text with a lone surrogate.
    """
    if value is None or value == {}:
        return None
    if pa.types.is_string(kind) and isinstance(value, str):
        value.encode()
        return value
    if pa.types.is_boolean(kind) and isinstance(value, bool):
        return value
    if isinstance(value, bool):
        raise ValueError
    if pa.types.is_int64(kind) and isinstance(value, int) and value in _INT64:
        return value
    if kind == _LARGE and isinstance(value, int) and abs(value) < _LARGE_END:
        return Decimal(value)
    if pa.types.is_float64(kind) and isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            raise ValueError from None
    if pa.types.is_list(kind) and isinstance(value, list):
        return [convert(item, kind.value_type) for item in value]
    if pa.types.is_struct(kind) and isinstance(value, dict):
        return {field.name: convert(value.get(field.name), field.type) for field in kind}
    raise ValueError


def array_of(values: list[object], field: pa.Field[Any], errors: dict[int, RowError]) -> pa.Array[Any]:
    """JSON values -> an array of the field's type; what does not fit becomes null and an entry in `errors`."""
    if pa.types.is_string(field.type):  # the common case, in which pyarrow is strict enough
        try:
            return pa.array(values, field.type)
        except (pa.ArrowException, UnicodeEncodeError):
            pass
    kept: list[object] = []
    for offset, value in enumerate(values):
        try:
            kept.append(convert(value, field.type))
        except UnicodeEncodeError:
            kept.append(None)
            errors.setdefault(offset, RowError("not_text", f"column `{field.name}` holds a lone surrogate"))
        except ValueError:
            kept.append(None)
            shown = ascii(value)
            shown = shown if len(shown) <= 40 else shown[:37] + "..."
            misfit = f"column `{field.name}` holds {shown} where {field.type} is expected"
            errors.setdefault(offset, RowError("malformed_record", misfit))
    array: pa.Array[Any] = pa.array(kept, field.type)
    return array
