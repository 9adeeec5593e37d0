"""Reading a whole input, in one go or split by split."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.source import Source, Split

Read = Callable[..., tuple[list[dict[str, Any]], dict[int, str]]]


@pytest.fixture(scope="session")
def read_all() -> Read:
    """`read_all(path, columns=None, rows_per_split=7, order=None, **open)` -> (rows, {row: error code}).

    As shards do: from the source's JSON, one split at a time, in the given order of splits.
    """

    def read(
        path: str | Path | list[str] | None = None,
        columns: Sequence[str] | None = None,
        *,
        rows_per_split: int = 7,
        order: Callable[[list[Split]], list[Split]] = list,
        max_bytes: int = 1 << 20,
        **options: Any,
    ) -> tuple[list[dict[str, Any]], dict[int, str]]:
        planned = Source.open(str(path) if isinstance(path, Path) else path, **options)
        source = Source.from_json(json.loads(json.dumps(planned.to_json())))
        splits = [Split.from_json(json.loads(json.dumps(split.to_json()))) for split in planned.splits(rows_per_split)]
        found: dict[int, dict[str, Any]] = {}
        errors: dict[int, str] = {}
        for split in order(splits):
            next_row = split.first_row
            for rows in source.read(split, columns or source.schema.names, max_bytes=max_bytes):
                assert rows.first_row == next_row
                for offset, row in enumerate(rows.batch.to_pylist()):
                    found[next_row + offset] = row
                errors |= {next_row + offset: error.code for offset, error in rows.errors.items()}
                next_row += rows.batch.num_rows
            assert next_row == split.first_row + split.num_rows
        source.close()
        assert sorted(found) == list(range(source.num_rows))
        return [found[row] for row in sorted(found)], errors

    return read
