"""An assignment -> its rows as token ids: read, rendered, tokenized, and cut or refused where they are too long."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.job_folder import JobFolder
from pipeline.prompts import Prompt, PromptBuilder
from pipeline.records import RecordLayout
from pipeline.source import Rows, Source, Split
from pipeline.tokenizer import Tokenizer
from workers.assignment import Assignment
from workers.work import Work

MAX_CHUNK_ROWS = 512

Tokens = list[int] | RowError
_In = TypeVar("_In")
_Out = TypeVar("_Out")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedRows:
    """Consecutive rows of an assignment, ready for the engine. The lists have an item for each of `rows`."""

    work: Work
    first_row: int
    batch: pa.RecordBatch  # the rows as read, from `first_row` on, for the columns that are carried over
    rows: range | list[int]  # of the job; those of `batch` that are to be run
    prompts: list[Tokens] | None  # to be continued; None in a job that does not generate
    passages: list[Tokens] | None  # to be embedded; None in a job that embeds no prompts
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextKind:
    """One of the texts that a row gives: the prompt that is continued, or the passage that is embedded."""

    builder: PromptBuilder
    max_tokens: int  # more than these are too many
    shortened_tokens: int  # where the row's text is cut, it is cut to so many
    truncates: bool


class Preparation:
    """Reads and tokenizes for one shard, in its reading thread. `prompts` or `passages` None: there are none."""

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        layout: RecordLayout,
        folder: JobFolder,
        *,
        prompts: TextKind | None,
        passages: TextKind | None,
    ) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._layout = layout
        self._folder = folder
        self._prompts = prompts
        self._passages = passages
        kinds = [kind for kind in (prompts, passages) if kind is not None]
        columns = [*(column for kind in kinds for column in kind.builder.columns), *layout.input_columns]
        self._columns = list(dict.fromkeys(columns))

    def read(self, assignment: Assignment) -> Iterator[TokenizedRows]:
        """All rows of the assignment's part, in order. JobError if the input or the base part can't be read."""
        work = Work(assignment, self._layout, self._folder)
        end = assignment.first_row + assignment.num_rows
        for rows in self._source.read(Split.from_json(assignment.split), self._columns):
            for start in range(0, rows.batch.num_rows, MAX_CHUNK_ROWS):
                yield self._tokenized(work, rows, start, min(MAX_CHUNK_ROWS, rows.batch.num_rows - start))
            if rows.first_row + rows.batch.num_rows >= end:
                return

    def _tokenized(self, work: Work, rows: Rows, start: int, length: int) -> TokenizedRows:
        first_row = rows.first_row + start
        batch = rows.batch.slice(start, length)
        to_run = work.rows_to_run(first_row, first_row + length)
        offsets = [row - rows.first_row for row in to_run]
        if len(offsets) == rows.batch.num_rows:
            chosen = rows
        else:
            contiguous = isinstance(to_run, range)
            chosen = Rows(
                first_row=first_row,
                batch=rows.batch.slice(offsets[0] if offsets else 0, len(offsets))
                if contiguous
                else rows.batch.take(pa.array(offsets, pa.int64())),
                errors={n: rows.errors[offset] for n, offset in enumerate(offsets) if offset in rows.errors}
                if rows.errors
                else {},
            )
        prompts = self.tokenize(self._prompts, chosen) if self._prompts else None
        passages = self.tokenize(self._passages, chosen) if self._passages else None
        return TokenizedRows(
            work=work,
            first_row=first_row,
            batch=batch,
            rows=to_run,
            prompts=prompts,
            passages=passages,
            num_tokens=sum(len(tokens) for tokens in (*(prompts or ()), *(passages or ())) if type(tokens) is list),
        )

    def tokenize(self, kind: TextKind, rows: Rows) -> list[Tokens]:
        """Each row's token ids, or why it has none."""
