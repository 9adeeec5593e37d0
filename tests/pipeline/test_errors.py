"""Errors are told in one line."""

from __future__ import annotations

from pipeline.errors import one_line


def test_what_an_exception_says_becomes_one_line_of_bounded_length() -> None:
    assert one_line(ValueError("row 3:\n  two columns,\tnot one ")) == "row 3: two columns, not one"
    assert len(one_line(ValueError("word " * 1000))) == 300
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
