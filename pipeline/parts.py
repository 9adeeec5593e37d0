"""Finished rows of one split, in any order -> one part in the order of the input, written as an attempt.

A row is made of pieces: its generations and its vectors. When the last piece of the last row is there the part can be
written. Values travel in columns: carried columns are the read batches' own buffers, vectors one preallocated matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.attempt import Attempt, write_part
from pipeline.carried import CarriedColumns
from pipeline.errors import RowError
from pipeline.job_folder import JobFolder, attempt_name
from pipeline.records import EmbedField, RecordLayout

Integers = npt.NDArray[np.int64]
Column: TypeAlias = "pa.Array[Any] | pa.ChunkedArray[Any]"
_Result = tuple[str | None, str | None, int | None, int | None, Sequence[float] | None]

_NOTHING: Final[_Result] = (None, None, None, None, None)


class PartBuilder:
    """Collects the rows `first_row` to `first_row + num_rows - 1` of one split.

    `kept` holds records of an earlier revision of the part that are taken over as they are
    (`pipeline.attempt.records_to_keep`); their rows need no work. Holds everything until it is written: about 100 bytes
    a row, the carried columns as read, and 4 bytes a component of a vector.

    Not to be used by several threads at once; `write` may run in another thread once the part is complete.
    """

    def __init__(
        self,
        layout: RecordLayout,
        *,
        split: int,
        first_row: int,
        num_rows: int,
        revision: int = 0,
        kept: pa.Table | None = None,
    ) -> None:
        assert num_rows > 0
        self._layout = layout
        self._split = split
        self._revision = revision
        self._first_row = first_row
        self._num_rows = num_rows
        self._each = max(layout.samples, 1)  # records of a row that does not fail
        self._results = [_NOTHING] * (num_rows * self._each)
        self._matrices: dict[EmbedField, npt.NDArray[np.float32]] = {}  # [rows * vectors a row, d]
        self._failed: dict[int, RowError] = {}  # offset -> why
        self._carried = CarriedColumns(layout, first_row=first_row, num_rows=num_rows)
        pieces = layout.samples + sum(self._vectors_a_row(field) for field in layout.vectors)
        self._missing = [pieces] * num_rows  # pieces that each row still waits for
        self._kept = None if kept is None else kept.select(layout.schema.names)
        self._kept_offsets = np.empty(0, np.int64)
        if kept is not None:
            self._kept_offsets = pc.unique(kept["row"]).to_numpy() - first_row
            for offset in self._kept_offsets.tolist():
                self._missing[self._offset(first_row + offset)] = 0
        self._num_waiting = num_rows - len(self._kept_offsets)

    @property
    def is_complete(self) -> bool:
        """Every row is there, so that `write` may be called."""
        return self._num_waiting == 0

    @property
    def num_waiting(self) -> int:
        """Rows that are neither finished nor failed."""
        return self._num_waiting

    def needs(self, row: int) -> bool:
        """Whether the row waits for something: false once it is finished or failed, and for a row that is kept."""
        return self._missing[self._offset(row)] > 0

    def carry(self, first_row: int, batch: pa.RecordBatch) -> None:
        """Takes the carried columns and the id from a read batch that begins with row `first_row` of the job.

        Batches come in the order of rows and cover the part's; what lies outside of the part is cut off.
        """
        self._carried.add(first_row, batch)

    def add(
        self,
        row: int,
        *,
        text: str,
        finish_reason: str,
        prompt_tokens: int,
        completion_tokens: int,
        logprobs: Sequence[float] | None = None,
        sample: int = 0,
    ) -> None:
        """One generation of one row. Dropped where the row has failed meanwhile."""
        offset = self._offset(row)
        if self._settle(offset):
            slot = offset * self._each + sample
            assert 0 <= sample < self._layout.samples
            assert self._results[slot] is _NOTHING, f"row {row} sample {sample} was added twice"
            self._results[slot] = (text, finish_reason, prompt_tokens, completion_tokens, logprobs)

    def add_vector(
        self,
        row: int,
        field: EmbedField,
        vector: npt.NDArray[np.float32],
        *,
        sample: int = 0,
        prompt_tokens: int | None = None,
    ) -> None:
        """The vector [d] of a row's prompt, or of one of its generations. Dropped where the row has failed meanwhile.

        `prompt_tokens` is kept where the job does not generate. A vector with NaN or infinities, or all zeros, makes
        the row `nonfinite` when the part is written.
        """
        offset = self._offset(row)
        if self._settle(offset):
            each = self._vectors_a_row(field)
            assert 0 <= sample < each
            self._matrix(field)[offset * each + sample] = vector
            if not self._layout.samples:
                self._results[offset] = (None, None, prompt_tokens, None, None)

    def fail(self, row: int, error: RowError) -> None:
        """Makes the row one error record. Pieces of it, there or still to come, are dropped; the first error wins."""
        offset = self._offset(row)
        if self._missing[offset]:
            self._missing[offset] = 0
            self._num_waiting -= 1
            self._failed[offset] = error
        else:
            assert offset in self._failed, f"row {row} fails though it is finished"

    def write(self, folder: JobFolder) -> Attempt:
        """Writes the part under a name of its own in `_attempts/` and flushes it to the disk.

        JobError where the storage fails; nothing is left then. To be called once, when the part is complete.
        """
        assert self.is_complete, f"{self._num_waiting} rows of split {self._split} are missing"
        self._refuse_vectors()
        try:
            table = self._table()
        except UnicodeEncodeError:
            self._refuse_texts()
            table = self._table()
        path = folder.attempts / attempt_name(self._split, self._revision)
        sha256, size_bytes = write_part(table, path)
        once = table.filter(pc.equal(table["sample"], pa.scalar(0, pa.int32()))) if self._each > 1 else table
        codes: Counter[str] = Counter(str(code) for code in table["error_code"].drop_null().to_pylist())
        return Attempt(
            split=self._split,
            revision=self._revision,
            path=f"{folder.attempts.name}/{path.name}",
            sha256=sha256,
            size_bytes=size_bytes,
            first_row=self._first_row,
            rows=self._num_rows,
            records=table.num_rows,
            samples=self._each,
            errors=codes.total(),
            error_codes=dict(sorted(codes.items())),
            vectors={
                field: pc.count((once if field == "prompt" else table)[column]).as_py()
                for field, column in self._layout.vectors.items()
            },
            prompt_tokens=pc.sum(once["prompt_tokens"]).as_py() or 0,
            completion_tokens=pc.sum(table["completion_tokens"]).as_py() or 0,
        )

    def _offset(self, row: int) -> int:
        offset = row - self._first_row
        assert 0 <= offset < self._num_rows, f"row {row} is not in this part"
        return offset

    def _settle(self, offset: int) -> bool:
        """Counts one piece of the row as there. False where the row has failed and the piece is to be dropped."""
        left = self._missing[offset] - 1
        if left < 0:
            assert offset in self._failed, f"row {self._first_row + offset} got more than it has room for"
            return False
        self._missing[offset] = left
        if left == 0:
            self._num_waiting -= 1
        return True

    def _vectors_a_row(self, field: EmbedField) -> int:
        return 1 if field == "prompt" else self._layout.samples

    def _matrix(self, field: EmbedField) -> npt.NDArray[np.float32]:
        """The vectors of a field [rows * vectors a row, d]; zeros take no memory until they are written to."""
        matrix = self._matrices.get(field)
        if matrix is None:
            width = self._layout.schema.field(self._layout.vectors[field]).type.list_size
            matrix = np.zeros((self._num_rows * self._vectors_a_row(field), width), np.float32)
            self._matrices[field] = matrix
        return matrix

    def _refuse_vectors(self) -> None:
        """Rows with a vector that can't be searched for become `nonfinite`."""
        for field, matrix in self._matrices.items():
            finite = np.asarray(np.isfinite(matrix).all(axis=1))
            each = self._vectors_a_row(field)
            searchable = (finite & matrix.any(axis=1)).reshape(self._num_rows, each)
            searchable[self._kept_offsets] = True  # their vectors are in the kept records
            for place in np.flatnonzero(~searchable).tolist():
                flaw = "is all zeros" if finite[place] else "holds NaN or infinities"
                error = RowError("nonfinite", f"the embedding of the {field} {flaw}")
                self._failed.setdefault(place // each, error)

    def _refuse_texts(self) -> None:
        """Rows whose text Arrow can't hold become `internal`: no tokenizer's decoder gives half a surrogate pair."""
        for slot, (text, *_) in enumerate(self._results):
            if text is not None and text != _encodable(text):
                error = RowError("internal", "the generated text is not valid Unicode")
                self._failed.setdefault(slot // self._each, error)

    def _table(self) -> pa.Table:
        """All records, in the order of rows and samples."""
        for offset in self._failed:
            self._results[offset * self._each : (offset + 1) * self._each] = [_NOTHING] * self._each
        each = np.full(self._num_rows, self._each)  # records of each row
        each[list(self._failed)] = 1
        each[self._kept_offsets] = 0
        offsets = np.repeat(np.arange(self._num_rows), each)
        samples = np.arange(len(offsets)) - np.repeat(np.cumsum(each) - each, each)
        fresh = self._records(offsets, samples)
        return fresh if self._kept is None else _interleave(fresh, self._kept)

    def _records(self, offsets: Integers, samples: Integers) -> pa.Table:
        """The records of rows that are not kept: `offsets` [records] says whose, `samples` [records] the number."""
        schema = self._layout.schema
        results: Sequence[_Result] = self._results
        if len(offsets) != len(self._results):
            results = [self._results[slot] for slot in (offsets * self._each + samples).tolist()]
        text, finish_reason, prompt_tokens, completion_tokens, logprobs = (
            zip(*results, strict=True) if results else ((),) * 5
        )
        rows = pa.array(offsets + self._first_row)
        columns: dict[str, Any] = {
            "row": rows,
            "sample": samples.astype(np.int32),
            "text": text,
            "finish_reason": finish_reason,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "logprobs": logprobs,
            "error_code": self._error_column(offsets, [error.code for error in self._failed.values()]),
            "error_message": self._error_column(
                offsets, [_encodable(error.message) for error in self._failed.values()]
            ),
        }
        arrays: dict[str, Column] = {
            name: pa.array(values, schema.field(name).type) for name, values in columns.items()
        }
        arrays |= {
            column: self._vector_column(field, offsets, samples) for field, column in self._layout.vectors.items()
        }
        arrays |= self._carried.columns(offsets)
        if self._layout.id_column is None:
            arrays["id"] = pc.cast(rows, pa.string())
        if not self._layout.vectors:
            arrays["embedding"] = pa.nulls(len(offsets), schema.field("embedding").type)
        return pa.table([arrays[name] for name in schema.names], schema=schema)

    def _error_column(self, offsets: Integers, values: list[str]) -> pa.Array[Any]:
        """`values` in the order of `self._failed`, each at its row's record [records]; null elsewhere."""
        failed = np.fromiter(self._failed, np.int64, len(self._failed))
        where = np.full(self._num_rows, -1)
        where[failed] = np.arange(len(failed))
        chosen = where[offsets]
        return pa.array(values, pa.string()).take(pa.array(chosen, mask=chosen < 0))

    def _vector_column(self, field: EmbedField, offsets: Integers, samples: Integers) -> pa.Array[Any]:
        kind = self._layout.schema.field(self._layout.vectors[field]).type
        matrix = self._matrix(field)
        failed = np.zeros(self._num_rows, bool)
        failed[list(self._failed)] = True
        each = self._vectors_a_row(field)
        if len(offsets) != len(matrix) or each != self._each:
            matrix = matrix[offsets * each + (samples if each > 1 else 0)]
        values: pa.Array[Any] = pa.array(matrix.reshape(-1))
        vectors = pa.FixedSizeListArray.from_arrays(values, type=kind, mask=pa.array(failed[offsets]))
        return cast("pa.Array[Any]", vectors)


def _interleave(fresh: pa.Table, kept: pa.Table) -> pa.Table:
    """Both tables' records in the order of rows, none copied. A row's records all stand in one of the two, in order."""
    rows = np.concatenate([fresh["row"].to_numpy(), kept["row"].to_numpy()])
    order = np.argsort(rows, kind="stable")
    runs = np.split(order, np.flatnonzero(np.diff(order) != 1) + 1) if len(order) else []
    both = pa.concat_tables([fresh, kept.cast(fresh.schema)])
    return pa.concat_tables([both.slice(run[0], len(run)) for run in runs]) if runs else both


def _encodable(text: str) -> str:
    """`text` with what UTF-8 can't hold (lone surrogates) as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
