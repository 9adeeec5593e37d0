"""The texts that a vocabulary is trained on, from any input that a job can read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from pipeline.errors import RowError, UserError
from pipeline.formats.registry import format_of
from pipeline.locations import is_uri
from pipeline.python_values import values_of
from pipeline.source import Source


def corpus_texts(path: str) -> Iterator[str | RowError]:
    """Yield the text of every row of `path` (a file, folder, glob or URI), or why a row has none.

    A file whose ending no format has (`notes.md`, `*.py`) is read as plain text. Of several text columns the one called
    `text` is read, or else all of them. Memory is a batch of rows. UserError and JobError come with the first text:
    nothing is opened before.
    """
    is_plain = not is_uri(path) and not Path(path).is_dir() and format_of(path) is None
    source = Source.open(path, format="lines" if is_plain else "auto")
    try:
        columns = _text_columns(source, path)
        for split in source.splits():
            for rows in source.read(split, columns):
                for name in columns:
                    errors = dict(rows.errors)
                    values = values_of(rows.batch.column(name), name, errors)
                    yield from (errors.get(offset, value) for offset, value in enumerate(values))
    finally:
        source.close()


def _text_columns(source: Source, path: str) -> list[str]:
    names = [field.name for field in source.schema if pa.types.is_string(field.type)]
    if source.text_column is not None:
        return [source.text_column]
    if not names:
        raise UserError(f"{path}: has no text column (its columns are {', '.join(source.schema.names)})")
    return ["text"] if "text" in names else names
