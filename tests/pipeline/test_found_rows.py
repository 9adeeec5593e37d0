"""Records of what was found: the same ones however many are asked for together, and none for another's."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipeline.commits import CommitLog
from pipeline.errors import JobError
from pipeline.found_rows import FoundRow, FoundRows
from pipeline.job_folder import JobFolder, write_job, write_plan
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout

ROWS, SPLIT_ROWS, SAMPLES = 120, 50, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> JobFolder:
    """A job of two generations a row, whose prompts are made of two columns that are carried along."""
    folder = JobFolder(tmp_path_factory.mktemp("job"))
    log = CommitLog(folder, fingerprint="f")
    log.recover()
    carried = pa.schema([pa.field("title", pa.string()), pa.field("number", pa.int64())])
    layout = RecordLayout.of(samples=SAMPLES, embeds=None, carried=carried)
    splits = []
    for split, first in enumerate(range(0, ROWS, SPLIT_ROWS)):
        rows = range(first, min(first + SPLIT_ROWS, ROWS))
        builder = PartBuilder(layout, split=split, first_row=first, num_rows=len(rows))
        titles = [f"title {row}" for row in rows]
        builder.carry(first, pa.record_batch({"title": titles, "number": [row * 7 for row in rows]}))
        for row in rows:
            for sample in range(SAMPLES):
                builder.add(
                    row,
                    text=f"answer {row}.{sample}",
                    finish_reason="stop",
                    prompt_tokens=1,
                    completion_tokens=1,
                    sample=sample,
                )
        log.publish(log.commit(builder.write(folder)))
        splits.append({"index": split, "first_row": first, "num_rows": len(rows)})
    write_plan(folder, fingerprint="f", splits=splits, document={})
    prompt = {"template": "{{ title }} ({{ number }})", "column": None}
    spec: dict[str, Any] = {"output": {"columns": ["title", "number"]}, "embed": None, "prompt": prompt}
    write_job(folder, fingerprint="f", document={"spec": spec})
    return folder


def record(row: int, sample: int) -> FoundRow:
    return FoundRow(
        row=row,
        id=str(row),
        sample=sample,
        generation=f"answer {row}.{sample}",
        passage=f"title {row} ({row * 7})",
        columns={"title": f"title {row}", "number": row * 7},
    )


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("rows", [[49], [119, 3, 50, 99, 0], list(range(0, 45)), list(reversed(range(ROWS)))])
def test_few_and_many_records_over_several_parts(folder: JobFolder, rows: list[int], cache_bytes: int) -> None:
    found = FoundRows(folder.root, cache_bytes=cache_bytes)
    wanted = [(row, row % SAMPLES) for row in rows]
    for _ in range(2):  # the second time from memory
        records = found.read(wanted)
        assert {at: records[at] for at in wanted} == {at: record(*at) for at in wanted}


@pytest.mark.parametrize("wanted", [(ROWS, 0), (7, SAMPLES)])
def test_a_record_that_no_part_has_is_named(folder: JobFolder, wanted: tuple[int, int]) -> None:
    with pytest.raises(JobError, match=rf"row {wanted[0]}, sample {wanted[1]}, is in the index but in no part"):
        FoundRows(folder.root).read([(3, 0), wanted])
