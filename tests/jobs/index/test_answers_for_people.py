"""What `gristmill query` prints for people."""

from __future__ import annotations

import io

import pytest

from jobs.answers import Answers
from jobs.index.query import Hit, QueryResult, describe_results


def hit(row: int, job: str = "first", **changes: object) -> Hit:
    values = {"id": str(row), "sample": 0, "field": "prompt", "score": 0.5, "text": f"text {row}", "columns": {}}
    return Hit(row=row, job=job, **values | changes)  # type: ignore[arg-type]


def test_hits_name_what_tells_them_apart_and_no_more() -> None:
    alike = QueryResult(query="a query", hits=(hit(3), hit(5, id="key-5", sample=1)))
    assert describe_results([alike]).splitlines() == [
        "a query",
        "  0.5000  row 3",
        "    text 3",
        "  0.5000  row 5, key-5, sample 1",
        "    text 5",
    ]
    apart = QueryResult(query="a query", hits=(hit(3), hit(3, job="second")))
    assert describe_results([apart]).splitlines()[1::2] == ["  0.5000  row 3 of first", "  0.5000  row 3 of second"]
    assert describe_results([QueryResult(query="a query", hits=())]) == "a query\n  nothing found"


def test_what_a_terminal_has_no_character_for_is_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="latin-1", write_through=True))
    Answers(["query"], None).answer({}, "né — 😀")
    assert shown.getvalue() == "né ? ?\n".encode("latin-1")
