"""What counts as text."""

from __future__ import annotations

from typing import TypeGuard

from pipeline.errors import RowError

NOT_TEXT = RowError("not_text", "the prompt is not text: it holds a lone surrogate")


def is_text(text: object) -> TypeGuard[str]:
    """Whether `text` is a string that UTF-8 can hold."""
    if not isinstance(text, str):
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
