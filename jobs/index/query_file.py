"""Queries in a file of any format that jobs read: a row each."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.errors import RowError, UserError
from pipeline.row_text import RowText
from pipeline.source import Source


def read_queries(path: str, column: str | None = None) -> list[str]:
    """All of them, in order. UserError naming the first row that is no text, or where nothing says which column."""
    source = Source.open(path)
    try:
        texts = list(_texts(path, source, RowText(source.columns, column=column, text_column=source.text_column)))
    finally:
        source.close()
    if not texts:
        raise UserError(f"--file {path}: holds no rows")
    return texts


def _texts(path: str, source: Source, form: RowText) -> Iterator[str]:
    for split in source.splits():
        for rows in source.read(split, form.columns):
            for offset, text in enumerate(form.texts(rows.batch, rows.errors)):
                if isinstance(text, RowError):
                    raise UserError(f"--file {path}, row {rows.first_row + offset}: {text.message}")
                yield text
