"""Queries in a file: a row each, of the column that is named or the only one that holds text."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.index.query_file import read_queries
from pipeline.errors import UserError


@pytest.fixture
def several(tmp_path: Path) -> str:
    path = tmp_path / "queries.parquet"
    pq.write_table(pa.table({"n": [1, 2], "question": ["one", "two"], "title": ["a", "b"]}), path)
    return str(path)


def test_queries_are_of_the_column_that_is_named_or_the_only_one(several: str, tmp_path: Path) -> None:
    assert read_queries(several, "title") == ["a", "b"]
    (tmp_path / "lines.txt").write_text("one\ntwo words\n")
    assert read_queries(str(tmp_path / "lines.txt")) == ["one", "two words"]


def test_what_is_no_column_of_queries_is_said_in_the_commands_own_terms(several: str) -> None:
    with pytest.raises(UserError) as caught:
        read_queries(several)
    assert str(caught.value) == f"query: {several} has the text columns question, title; name one with --column"
    with pytest.raises(UserError) as caught:
        read_queries(several, "n")
    assert str(caught.value) == f"query: column 'n' of {several} holds int64, not text"
    with pytest.raises(UserError, match="no column 'titel'; did you mean 'title'"):
        read_queries(several, "titel")
