"""An assignment -> its rows as token ids: read, rendered, tokenized, and cut or refused where they are too long."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa

from pipeline.embedding import EmbeddedText, TextEncoder, TextForm
from pipeline.errors import RowError
from pipeline.job_folder import JobFolder
from pipeline.prompts import Prompt
from pipeline.records import RecordLayout
from pipeline.source import Rows, Source, Split
from pipeline.tokenizer import Tokenizer
from workers.assignment import Assignment
from workers.text_kinds import TextKind
from workers.work import Work

MAX_CHUNK_ROWS = 512

Tokens = list[int] | RowError
Passage = EmbeddedText | RowError
_Encoded = TypeVar("_Encoded", list[int], EmbeddedText)
_In = TypeVar("_In")
_Out = TypeVar("_Out")

_EMPTY = RowError("empty_prompt", "the text has no tokens")
_NOTHING = RowError("empty_generation", "the model generated no text that could be embedded")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedRows:
    """Consecutive rows of an assignment, ready for the engine. The lists have an item for each of `rows`."""

    work: Work
    first_row: int
    batch: pa.RecordBatch  # the rows as read, from `first_row` on, for the columns that are carried over
    rows: range | list[int]  # of the job; those of `batch` that are to be run
    prompts: list[Tokens] | None  # to be continued; None in a job that does not generate
    passages: list[Passage] | None  # to be embedded; None in a job that embeds no prompts
    num_tokens: int


class Preparation:
    """Reads and tokenizes for one shard, in its reading thread. `prompts` or `passages` None: there are none.

    `text_form`: how a text that is embedded is put to the model.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        layout: RecordLayout,
        folder: JobFolder,
        *,
        prompts: TextKind | None,
        passages: TextKind | None,
        text_form: TextForm,
    ) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._layout = layout
        self._folder = folder
        self._prompts = prompts
        self._passages = passages
        self._embedded = TextEncoder(tokenizer, text_form)
        kinds = [kind for kind in (prompts, passages) if kind is not None]
        columns = [*(column for kind in kinds for column in kind.builder.columns), *layout.input_columns]
        self._columns = list(dict.fromkeys(columns))

    def read(self, assignment: Assignment) -> Iterator[TokenizedRows]:
        """All rows of the assignment's part, in order. JobError if the input or the base part can't be read."""
        work = Work(assignment, self._layout, self._folder)
        end = assignment.first_row + assignment.num_rows
        for rows in self._source.read(Split.from_json(assignment.split), self._columns):
            for start in range(0, rows.batch.num_rows, MAX_CHUNK_ROWS):
                if rows.first_row + start >= end:
                    return
                yield self._tokenized(work, rows, start, min(MAX_CHUNK_ROWS, rows.batch.num_rows - start))

    def _tokenized(self, work: Work, rows: Rows, start: int, length: int) -> TokenizedRows:
        first_row = rows.first_row + start
        to_run = work.rows_to_run(first_row, first_row + length)
        chosen = _select(rows, to_run)
        prompts = self._tokens(self._prompts, chosen, self._encode_prompts) if self._prompts and to_run else None
        passages = self._tokens(self._passages, chosen, self._encode_passages) if self._passages and to_run else None
        return TokenizedRows(
            work=work,
            first_row=first_row,
            batch=rows.batch.slice(start, length),
            rows=to_run,
            prompts=prompts,
            passages=passages,
            num_tokens=sum(_length(tokens) for tokens in (*(prompts or ()), *(passages or ()))),
        )

    def tokenize_generations(self, texts: Sequence[str]) -> list[Passage]:
        """Generated texts, to be embedded as passages are."""
        return self._encode_passages(
            [Prompt(text, add_special_tokens=True, parse_special=False) if text else _NOTHING for text in texts]
        )

    def _tokens(
        self, kind: TextKind, rows: Rows, encode: Callable[[Sequence[Prompt | RowError]], list[_Encoded | RowError]]
    ) -> list[_Encoded | RowError]:
        """Each row's token ids, or why it has none."""
        tokens = encode(self._build(kind, rows))
        for offset, ids in enumerate(tokens):
            if (length := _length(ids)) > kind.max_tokens:
                tokens[offset] = self._cut_down(kind, rows, offset, length, encode)
        return tokens

    def _build(self, kind: TextKind, rows: Rows) -> list[Prompt | RowError]:
        try:
            return kind.builder.build(rows)
        except Exception:  # whatever it is: one row's is not to cost the others
            log.exception("building prompts broke, which is done row by row now")
        return [
            _guarded(lambda one: kind.builder.build(one)[0], _select(rows, [row]))
            for row in range(rows.first_row, rows.first_row + rows.batch.num_rows)
        ]

    def _encode_prompts(self, prompts: Sequence[Prompt | RowError]) -> list[Tokens]:
        return _encoded(self._tokenizer.encode_batch, prompts)

    def _encode_passages(self, prompts: Sequence[Prompt | RowError]) -> list[Passage]:
        return _encoded(self._embedded.encode, prompts)

    def _cut_down(
        self,
        kind: TextKind,
        rows: Rows,
        offset: int,
        num_tokens: int,
        encode: Callable[[Sequence[Prompt | RowError]], list[_Encoded | RowError]],
    ) -> _Encoded | RowError:
        """What becomes of a text that has too many tokens."""
        if kind.shortened_tokens is None:
            return RowError(
                "prompt_too_long", f"{num_tokens:,} tokens{kind.counted}, and at most {kind.max_tokens:,} fit"
            )
        limit = kind.shortened_tokens

        def count(prompt: Prompt) -> int:
            ids = encode([prompt])[0]
            return limit + 1 if isinstance(ids, RowError) else _length(ids)

        shortened = _guarded(
            lambda at: kind.builder.shorten(rows, at, num_tokens=num_tokens, max_tokens=limit, count_tokens=count),
            offset,
        )
        return shortened if isinstance(shortened, RowError) else encode([shortened])[0]


def _encoded(
    encode: Callable[[Sequence[Prompt]], list[_Encoded | RowError]], prompts: Sequence[Prompt | RowError]
) -> list[_Encoded | RowError]:
    """Token ids, or the error that is there already, or why the text has none."""
    sound = [prompt for prompt in prompts if not isinstance(prompt, RowError)]
    try:
        encoded = encode(sound)
    except Exception:  # likewise: libraries raise what they like
        log.exception("tokenizing broke, which is done row by row now")
        encoded = [_guarded(lambda one: encode([one])[0], prompt) for prompt in sound]
    if len(sound) < len(prompts):
        rest = iter(encoded)
        encoded = [prompt if isinstance(prompt, RowError) else next(rest) for prompt in prompts]
    return [tokens if isinstance(tokens, RowError) or _length(tokens) else _EMPTY for tokens in encoded]


def _length(tokens: Tokens | Passage) -> int:
    """Token ids; none of a row that failed."""
    if isinstance(tokens, RowError):
        return 0
    return len(tokens.ids if isinstance(tokens, EmbeddedText) else tokens)


def _select(rows: Rows, wanted: range | list[int]) -> Rows:
    """The given rows of the job. The result's rows are consecutive in the batch, whatever they are in the job."""
    offsets = (
        range(wanted.start - rows.first_row, wanted.stop - rows.first_row)
        if isinstance(wanted, range)
        else [row - rows.first_row for row in wanted]
    )
    if isinstance(offsets, range):
        if len(offsets) == rows.batch.num_rows:
            return rows
        batch = rows.batch.slice(offsets.start, len(offsets))
    else:
        batch = rows.batch.take(pa.array(offsets, pa.int64()))
    errors = {place: rows.errors[offset] for place, offset in enumerate(offsets) if offset in rows.errors}
    return Rows(first_row=wanted[0] if wanted else rows.first_row, batch=batch, errors=errors if rows.errors else {})


def _guarded(make: Callable[[_In], _Out | RowError], item: _In) -> _Out | RowError:
    """What `make` makes of one item, or an `internal` error if it breaks."""
    try:
        return make(item)
    except Exception as error:
        return RowError("internal", f"{type(error).__name__}: {error}")
