"""One assignment under way: the part that its rows are collected into, and which of them are to be run."""

from __future__ import annotations

import pyarrow as pa

from pipeline.attempt import Attempt, records_to_keep
from pipeline.errors import RowError
from pipeline.job_folder import JobFolder
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout
from workers.assignment import Assignment, FinishedAssignment


class Work:
    """Begun by the reading thread, then used by the shard's own thread alone."""

    def __init__(self, assignment: Assignment, layout: RecordLayout, folder: JobFolder) -> None:
        """JobError if the base part can't be read."""
        self.assignment = assignment
        self.identity = (assignment.index, assignment.revision)
        self._folder = folder
        kept = self._records_to_keep()
        self.builder = PartBuilder(
            layout,
            split=assignment.index,
            first_row=assignment.first_row,
            num_rows=assignment.num_rows,
            revision=assignment.revision,
            kept=kept,
        )
        if assignment.condemned:
            self.fail(
                assignment.first_row + assignment.start,
                RowError("worker_killed", "a worker died each time that it ran this row, also alone"),
            )
        self.num_to_run = self.builder.num_waiting
        self._runs_all = self.num_to_run == assignment.num_rows
        self._num_read = 0

    def _records_to_keep(self) -> pa.Table | None:
        """The base's records, without those that are to be run again."""
        base = self.assignment.base
        if base is None:
            return None
        records = records_to_keep(self._folder.parts / base.part, base.sha256, retry_errors=False)
        if not self.assignment.retry_errors:
            return records
        offsets = records["row"].to_numpy() - self.assignment.first_row
        failed = records["error_code"].is_valid().to_numpy()
        again = failed & (offsets >= self.assignment.start) & (offsets < self.assignment.stop)
        return records.filter(pa.array(~again))

    def carry(self, first_row: int, batch: pa.RecordBatch) -> None:
        """The next rows as they were read, for the columns that are carried over."""
        self.builder.carry(first_row, batch)
        self._num_read = first_row + batch.num_rows - self.assignment.first_row

    @property
    def is_complete(self) -> bool:
        return self.builder.is_complete and self._num_read >= self.assignment.num_rows

    @property
    def num_done(self) -> int:
        """Of `num_to_run` rows, how many have come to their end."""
        return self.num_to_run - self.builder.num_waiting

    def rows_to_run(self, first_row: int, stop_row: int) -> range | list[int]:
        """Of the job's rows [first_row, stop_row), those that this assignment runs."""
        first = max(first_row, self.assignment.first_row)
        stop = min(stop_row, self.assignment.first_row + self.assignment.num_rows)
        if self._runs_all:
            return range(first, stop)
        return [row for row in range(first, stop) if self.builder.needs(row)]

    def fail(self, row: int, error: RowError) -> bool:
        """The row becomes an error row. False if it was one before."""
        if not self.builder.needs(row):
            return False
        self.builder.fail(row, error)
        return True

    def write(self) -> FinishedAssignment:
        """Once the builder is complete; JobError if the storage fails. May run in another thread."""
        attempt: Attempt = self.builder.write(self._folder)
        return FinishedAssignment(
            index=self.assignment.index,
            revision=self.assignment.revision,
            start=self.assignment.start,
            stop=self.assignment.stop,
            attempt=attempt.to_json(),
        )
