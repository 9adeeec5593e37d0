"""Files of ids whose rows are to be deleted."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.index.index_commands import read_ids


@pytest.mark.parametrize("inside", ["\u2028", "\x85", "\v", "\f", "\x1c", "\x1d", "\x1e", "\r"])
def test_an_id_a_line_whatever_else_unicode_ends_lines_with(tmp_path: Path, inside: str) -> None:
    file = tmp_path / "ids"
    file.write_bytes(f"\ufeffone\r\n7{inside}8\n\nlast".encode())
    assert read_ids(file) == ["one", f"7{inside}8", "last"]
