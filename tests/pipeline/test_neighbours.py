"""Parts of a bulk search on a disk that fails."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

import pipeline.durable
from pipeline.commits import Commit, CommitLog
from pipeline.errors import JobError, RowError
from pipeline.job_folder import JobFolder
from pipeline.neighbours import SCHEMA, NeighbourPart
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout


@pytest.fixture
def queries(tmp_path: Path) -> Commit:
    """One query, which failed."""
    folder = JobFolder(tmp_path / "queries")
    log = CommitLog(folder, fingerprint="f")
    log.recover()
    builder = PartBuilder(RecordLayout.of(samples=0, embeds="prompt", dimension=2), split=0, first_row=0, num_rows=1)
    builder.fail(0, RowError("internal", "no"))
    commit = log.commit(builder.write(folder))
    log.publish(commit)
    return commit


@pytest.mark.parametrize("full_from", ["open", "add", "close"])
def test_a_full_disk_is_one_line_that_names_the_file(
    queries: Commit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_from: str
) -> None:
    folder = JobFolder(tmp_path / "found")
    folder.create()

    def refuse(handle: int, content: bytes | memoryview) -> None:
        raise OSError(28, "No space left on device")

    def begin(step: str) -> None:
        if step == full_from:
            monkeypatch.setattr(pipeline.durable, "write_all", refuse)

    def write() -> None:
        begin("open")
        part = NeighbourPart(folder, queries)
        begin("add")
        part.add(pa.Table.from_pylist([{"query_row": 0, "error_code": "internal"}], SCHEMA))
        begin("close")
        part.close()

    with pytest.raises(JobError, match=r"^writing .*/_attempts/.* failed: no space left") as caught:
        write()
    assert "\n" not in str(caught.value)
