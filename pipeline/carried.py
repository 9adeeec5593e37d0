"""Input columns on their way into a part: kept as the read batches' own buffers, never as Python objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.records import RecordLayout

_TAKE_BYTES: Final = 256 << 20


class CarriedColumns:
    """The carried columns, and the id where the input has one, of rows `first_row` to `first_row + num_rows - 1`."""

    def __init__(self, layout: RecordLayout, *, first_row: int, num_rows: int) -> None:
        sources = [(target, name) for name, target in layout.carried.items()]
        if layout.id_column is not None:
            sources.append(("id", layout.id_column))
        self._sources = dict(sources)  # column of the part -> column of the input
        self._schema = pa.schema([layout.schema.field(target) for target in self._sources])
        self._first_row = first_row
        self._num_rows = num_rows
        self._num_carried = 0
        self._batches: list[pa.RecordBatch] = []  # of `_schema`

    def add(self, first_row: int, batch: pa.RecordBatch) -> None:
        """The next read batch, whose first row is `first_row` of the job; what lies outside of the rows is cut off."""
        start = max(self._first_row + self._num_carried - first_row, 0)
        stop = min(self._first_row + self._num_rows - first_row, batch.num_rows)
        if stop > start:
            assert first_row + start == self._first_row + self._num_carried, "a batch is missing"
            arrays = [
                _cast(batch.column(source).slice(start, stop - start), self._schema.field(target).type)
                for target, source in self._sources.items()
            ]
            if arrays:
                self._batches.append(pa.record_batch(arrays, schema=self._schema))
            self._num_carried += stop - start

    def columns(self, offsets: npt.NDArray[np.int64]) -> dict[str, pa.ChunkedArray[Any]]:
        """Column of the part -> its values for rows `first_row + offsets` [records], ascending, some perhaps twice."""
        if not self._sources:
            return {}
        assert self._num_carried == self._num_rows, "batches are missing"
        batches = self._batches
        if not np.array_equal(offsets, np.arange(self._num_rows)):
            batches = list(_take(self._batches, offsets))
        table = pa.Table.from_batches(batches, self._schema)
        return {name: table[name] for name in self._sources}


def _take(batches: Sequence[pa.RecordBatch], offsets: npt.NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
    """The rows at ascending `offsets` into the batches laid end to end, in pieces small enough for 32-bit offsets."""
    start = 0
    for batch in batches:
        step = max(batch.num_rows * _TAKE_BYTES // max(batch.nbytes, 1), 1)
        for first in range(0, batch.num_rows, step):
            bounds = (start + first, start + min(first + step, batch.num_rows))
            low, high = np.searchsorted(offsets, bounds)
            if high > low:
                yield batch.take(pa.array(offsets[low:high] - start, pa.int64()))
        start += batch.num_rows


def _cast(array: pa.Array[Any], kind: pa.DataType) -> pa.Array[Any]:
    if isinstance(array.type, pa.RunEndEncodedType):
        array = pc.call_function("run_end_decode", [array])
    if array.type == kind:
        return array
    try:
        return array.cast(kind)
    except pa.ArrowInvalid:
        if not (pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type)):
            raise
        decoded = [None if value is None else value.decode("utf-8", "replace") for value in array.to_pylist()]
        return pa.array(decoded, kind)
