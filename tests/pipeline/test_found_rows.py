"""Records of what was found: the same ones however many are asked for together, and none for another's."""

from __future__ import annotations

from pathlib import Path
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
    columns = {"title": [f"title {row}" for row in range(ROWS)], "number": [row * 7 for row in range(ROWS)]}
    root = tmp_path_factory.mktemp("job")
    return job_of(root, pa.record_batch(columns), samples=SAMPLES, template="{{ title }} ({{ number }})", column=None)


def job_of(root: Path, carried: pa.RecordBatch, *, samples: int, **prompt: str | None) -> JobFolder:
    folder = JobFolder(root)
    log = CommitLog(folder, fingerprint="f")
    log.recover()
    layout = RecordLayout.of(samples=samples, embeds=None, carried=carried.schema)
    splits = []
    for split, first in enumerate(range(0, len(carried), SPLIT_ROWS)):
        rows = range(first, min(first + SPLIT_ROWS, len(carried)))
        builder = PartBuilder(layout, split=split, first_row=first, num_rows=len(rows))
        builder.carry(first, carried.slice(first, len(rows)))
        for row in rows:
            for sample in range(samples):
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
    spec: dict[str, Any] = {"output": {"columns": carried.schema.names}, "embed": None, "prompt": prompt}
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


KEPT = "2024-05-31T12:00:00.123456"


def test_moments_that_python_cannot_hold_are_cut_or_none(tmp_path: Path) -> None:
    nanoseconds = 1_717_156_800_123_456_789
    number = pa.array([nanoseconds, nanoseconds % (86_400 * 10**9)])
    inner = pa.StructArray.from_arrays([number.cast(pa.timestamp("ns"))], names=["at"])
    columns: dict[str, Any] = {
        "created": number.cast(pa.timestamp("ns")),
        "time": number[1:].cast(pa.time64("ns")).take([0, 0]),
        "took": pa.array([1_000_000_001, 0]).cast(pa.duration("ns")),
        "inner": inner,
        "day": pa.array([4_000_000, 0], pa.int32()).cast(pa.date32()),
        "far": pa.array([2**62, 0]).cast(pa.timestamp("us")),
    }
    folder = job_of(tmp_path, pa.record_batch(columns), samples=1, template=None, column="title")
    records = FoundRows(folder.root).read([(0, 0), (1, 0)])
    assert records[0, 0].columns == {
        "created": KEPT,
        "time": KEPT.partition("T")[2],
        "took": "0:00:01",
        "inner": {"at": KEPT},
        "day": None,
        "far": None,
    }
    assert records[1, 0].columns["day"] == "1970-01-01"
    assert records[1, 0].columns["far"] == "1970-01-01T00:00:00"


@pytest.mark.parametrize("wanted", [(ROWS, 0), (7, SAMPLES)])
def test_a_record_that_no_part_has_is_named(folder: JobFolder, wanted: tuple[int, int]) -> None:
    with pytest.raises(JobError, match=rf"row {wanted[0]}, sample {wanted[1]}, is in the index but in no part"):
        FoundRows(folder.root).read([(3, 0), wanted])
