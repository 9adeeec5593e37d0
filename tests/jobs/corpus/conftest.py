"""A job over texts of three subjects, whose vectors say which, made without running anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.spec import JobSpec
from pipeline.commits import Commit, CommitLog
from pipeline.errors import RowError
from pipeline.job_folder import JobFolder, write_job, write_plan
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout

ROWS_A_SPLIT = 10
WORDS = ["tuple list sequence", "file path folder", "await coroutine task"]


def vector_of(row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """One of three directions, by the row's number, and a little of its own."""
    vector = np.zeros(16, np.float32)
    vector[row % 3] = 1.0
    vector[3 + row % 13] += 0.2
    return (vector / np.linalg.norm(vector)).astype(np.float32)


@pytest.fixture
def committed(tmp_path: Path) -> Callable[..., tuple[JobFolder, dict[int, Commit]]]:
    """A job over `count` rows whose columns are `body` and `kind`; every tenth of them failed, from row 5 on.

    `others`: further columns, whose values are their names.
    """

    def make(count: int, kinds: int = 200, others: tuple[str, ...] = ()) -> tuple[JobFolder, dict[int, Commit]]:
        folder = JobFolder(tmp_path / "out")
        spec = JobSpec.model_validate(
            {
                "name": "mapped",
                "model": "model",
                "input": {"path": "rows.parquet"},
                "prompt": {"template": "{{ body }}"},
                "embed": {},
                "output": {"path": str(folder.root), "columns": ["body", "kind", *others]},
            }
        )
        folder.create()
        splits = [
            {"index": number, "first_row": first, "num_rows": min(ROWS_A_SPLIT, count - first)}
            for number, first in enumerate(range(0, count, ROWS_A_SPLIT))
        ]
        write_plan(folder, fingerprint="this job", splits=splits, document={})
        write_job(folder, fingerprint="this job", document={"spec": spec.to_json()})
        log = CommitLog(folder, fingerprint="this job")
        log.recover()
        schema = pa.schema(dict.fromkeys(("body", "kind", *others), pa.string()))
        layout = RecordLayout.of(samples=0, embeds="prompt", dimension=16, carried=schema)
        for split in splits:
            rows = range(split["first_row"], split["first_row"] + split["num_rows"])
            builder = PartBuilder(
                layout, split=split["index"], first_row=split["first_row"], num_rows=split["num_rows"]
            )
            table = {"body": [body_of(row) for row in rows], "kind": [f"kind {row % kinds}" for row in rows]}
            table |= {name: [name] * len(rows) for name in others}
            builder.carry(rows[0], pa.record_batch(table, schema=schema))
            for row in rows:
                if row % 10 == 5:
                    builder.fail(row, RowError("not_text", "it holds <null>"))
                else:
                    builder.add_vector(row, "prompt", vector_of(row), prompt_tokens=3)
            log.publish(log.commit(builder.write(folder)))
        return folder, dict(log.commits)

    return make


def body_of(row: int) -> str:
    return f"{WORDS[row % 3]} number {row}"


@pytest.fixture
def words() -> list[str]:
    """The words of each subject."""
    return WORDS


@pytest.fixture
def text_of() -> Callable[[int], str]:
    """Of a row. Its subject is its number modulo 3."""
    return body_of
