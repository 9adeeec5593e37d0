"""Columns as files hold them -> columns as the rest of the pipeline sees them: few types, whole text, errors by row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.formats.base import Chunk

_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view, pa.types.is_large_list_view)


def plain_type(kind: Any) -> pa.DataType:
    """The type that values of `kind` are read as: every encoding of text is `string`, dictionaries are unpacked.

    >>> plain_type(pa.dictionary(pa.int8(), pa.large_string()))
    DataType(string)
    """
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([plain_field(field) for field in kind])
    if pa.types.is_map(kind):
        mapping: pa.DataType = pa.map_(plain_type(kind.key_type), plain_type(kind.item_type))
        return mapping
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type), int(kind.list_size))
    if any(is_kind(kind) for is_kind in _LISTS):
        return pa.list_(plain_type(kind.value_type))
    plain: pa.DataType = kind
    return plain


def plain_field(field: pa.Field[Any]) -> pa.Field[Any]:
    return pa.field(field.name, plain_type(field.type))


def holds_text(kind: Any) -> bool:
    """Whether text lies anywhere in values of this (plain) type."""
    if pa.types.is_struct(kind) or pa.types.is_map(kind) or pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return any(holds_text(kind.field(i).type) for i in range(kind.num_fields))
    return pa.types.is_string(kind)


def unpacked(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with values in place of references to a dictionary or to runs, so that its size is what it takes."""
    for index, field in enumerate(batch.schema):
        if pa.types.is_dictionary(field.type) or pa.types.is_run_end_encoded(field.type):
            array = batch.column(index).cast(field.type.value_type)
            batch = batch.set_column(index, pa.field(field.name, array.type), array)
    return batch


def joined(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """The rows of all batches in one."""
    if len(batches) == 1:
        return batches[0]
    whole = pa.Table.from_batches(batches).combine_chunks().to_batches()
    assert len(whole) == 1
    return whole[0]


def conform(batch: pa.RecordBatch, columns: pa.Schema) -> Chunk:
    """Bring a batch to just these columns and types.

    A value that does not fit its type, or text that is no UTF-8, becomes null, and its row an error.
    """
    arrays: list[pa.Array[Any]] = []
    errors: dict[int, RowError] = {}
    for field in columns:
        array = batch.column(field.name)
        if array.type != field.type:
            array = _cast(array, field, errors)
        if holds_text(field.type):
            array = _whole_text(array, field, errors)
        arrays.append(array)
    return Chunk(batch=pa.RecordBatch.from_arrays(arrays, schema=columns), errors=errors)


def _cast(array: pa.Array[Any], field: pa.Field[Any], errors: dict[int, RowError]) -> pa.Array[Any]:
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    try:
        return array.cast(field.type)
    except (pa.ArrowException, ValueError):
        pass
    pieces: list[pa.Array[Any]] = []
    for offset in range(len(array)):
        one = array.slice(offset, 1)
        try:
            try:
                pieces.append(one.cast(field.type))
            except pa.ArrowNotImplementedError:
                pieces.append(pa.array(one.to_pylist(), field.type))
        except UnicodeDecodeError:
            pieces.append(pa.nulls(1, field.type))
            errors.setdefault(offset, _not_utf8(field.name))
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            pieces.append(pa.nulls(1, field.type))
            detail = "is no valid UTF-8" if "UTF8" in str(error) else f"does not fit {field.type}"
            code = "not_text" if "UTF8" in str(error) else "malformed_record"
            errors.setdefault(offset, RowError(code, f"column `{field.name}`: the value {detail}"))
    return pa.concat_arrays(pieces)


def _whole_text(array: pa.Array[Any], field: pa.Field[Any], errors: dict[int, RowError]) -> pa.Array[Any]:
    if _is_valid(array):
        return array
    # take copies the row's own children; a slice of a nested array would still point at everyone's
    spoilt = [offset for offset in range(len(array)) if not _is_valid(array.take(pa.array([offset])))]
    for offset in spoilt:
        errors.setdefault(offset, _not_utf8(field.name))
    return _without(array, spoilt)


def _is_valid(array: pa.Array[Any]) -> bool:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _not_utf8(column: str) -> RowError:
    return RowError("not_text", f"column `{column}` is no valid UTF-8")


def _without(array: pa.Array[Any], offsets: Iterable[int]) -> pa.Array[Any]:
    """The array with null at `offsets`, whose values are never looked at."""
    pieces, start = [], 0
    for offset in offsets:
        pieces += [array.slice(start, offset - start), pa.nulls(1, array.type)]
        start = offset + 1
    return pa.concat_arrays([*pieces, array.slice(start)])
