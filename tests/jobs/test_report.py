"""The report's numbers are counted from parts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from jobs.report import NUM_BINS, histogram, summarize


def record(row: int, **values: Any) -> dict[str, Any]:
    empty = dict.fromkeys(["id", "finish_reason", "prompt_tokens", "completion_tokens", "error_code", "error_message"])
    return {"row": row, "sample": 0, **empty, **values}


SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "id": pa.string(),
        "sample": pa.int32(),
        "finish_reason": pa.string(),
        "prompt_tokens": pa.int32(),
        "completion_tokens": pa.int32(),
        "error_code": pa.string(),
        "error_message": pa.string(),
    }
)


def write_part(path: Path, records: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), path)
    return path


def test_a_row_with_several_samples_counts_once_and_its_generations_each(tmp_path: Path) -> None:
    part = write_part(
        tmp_path / "a.parquet",
        [
            record(0, prompt_tokens=10, completion_tokens=3, finish_reason="stop"),
            record(0, sample=1, prompt_tokens=10, completion_tokens=5, finish_reason="length"),
            record(1, error_code="empty_prompt", error_message="the prompt is empty"),
        ],
    )
    summary = summarize([part])
    assert summary.rows == 2
    assert summary.prompt_lengths == {10: 1}
    assert summary.completion_lengths == {3: 1, 5: 1}
    assert summary.finish_reasons == {"stop": 1, "length": 1}
    assert summary.errors == {"empty_prompt": 1}


def test_the_first_failed_rows_of_each_kind_are_shown_over_parts(tmp_path: Path) -> None:
    parts = [
        write_part(
            tmp_path / f"{number}.parquet",
            [
                record(row, id=f"doc-{row}", error_code="not_text", error_message=f"row {row}")
                for row in (2 * number, 2 * number + 1)
            ],
        )
        for number in range(4)
    ]
    summary = summarize(parts)
    assert summary.errors == {"not_text": 8}
    assert [example["row"] for example in summary.examples["not_text"]] == [0, 1, 2]
    assert [example["id"] for example in summary.examples["not_text"]] == ["doc-0", "doc-1", "doc-2"]


@given(st.dictionaries(st.integers(0, 10**6), st.integers(1, 10**9)))
def test_a_histogram_counts_each_length_once_in_its_bin(lengths: dict[int, int]) -> None:
    found = histogram(Counter(lengths))
    edges, counts = found["edges"], found["counts"]
    assert len(edges) == len(counts) + 1 <= NUM_BINS + 1
    values = sorted(Counter(lengths).elements()) if sum(lengths.values()) < 1000 else []
    if values:
        assert found["median"] == values[(len(values) - 1) // 2]
        assert found["p95"] == values[-(-len(values) * 95 // 100) - 1]
    for number, count in enumerate(counts):
        inside = [n for length, n in lengths.items() if edges[number] <= length < edges[number + 1]]
        assert count == sum(inside)
    assert sum(counts) == sum(lengths.values())
