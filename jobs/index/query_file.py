"""Queries in a file of any format that jobs read: a row each."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from pipeline.errors import RowError, UserError
from pipeline.row_text import RowText
from pipeline.schemas import InputSchema
from pipeline.source import Source


def read_queries(path: str, column: str | None = None) -> list[str]:
    """All of them, in order. UserError naming the first row that is no text, or where nothing says which column."""
    source = Source.open(path)
    try:
        name = column or source.text_column or only_text_column(path, source.columns)
        kind = source.columns.select([name]).field(0).type
        if not (pa.types.is_string(kind) or pa.types.is_binary(kind)):
            raise UserError(f"query: column {name!r} of {path} holds {kind}, not text")
        texts = list(_texts(path, source, RowText(source.columns, column=name)))
    finally:
        source.close()
    if not texts:
        raise UserError(f"--file {path}: holds no rows")
    return texts


def only_text_column(path: str, columns: InputSchema) -> str:
    names = columns.text_columns
    if len(names) != 1:
        raise UserError(f"query: {path} has the text columns {', '.join(names) or '(none)'}; name one with --column")
    return names[0]


def _texts(path: str, source: Source, form: RowText) -> Iterator[str]:
    for split in source.splits():
        for rows in source.read(split, form.columns):
            for offset, text in enumerate(form.texts(rows.batch, rows.errors)):
                if isinstance(text, RowError):
                    raise UserError(f"--file {path}, row {rows.first_row + offset}: {text.message}")
                yield text
