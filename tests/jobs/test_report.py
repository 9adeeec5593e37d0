"""The report: counted from parts, readable without a network, and safe to open whatever the rows hold."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.progress import Progress
from jobs.report import NUM_BINS, histogram, run_record, summarize
from jobs.report_page import render


def record(row: int, **values: Any) -> dict[str, Any]:
    empty = dict.fromkeys(["finish_reason", "prompt_tokens", "completion_tokens", "error_code", "error_message"])
    return {"row": row, "sample": 0, **empty, **values}


SCHEMA = pa.schema(
    {
        "row": pa.int64(),
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


def progress(elapsed_s: float, rows: int, tokens: int) -> Progress:
    return Progress(
        phase="rows",
        rows_done=100 + rows,
        rows_total=200,
        rows_at_start=100,
        error_rows=0,
        prompt_tokens=tokens,
        completion_tokens=tokens,
        elapsed_s=elapsed_s,
    )


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
            [record(2 * number + i, error_code="not_text", error_message=f"row {2 * number + i}") for i in range(2)],
        )
        for number in range(4)
    ]
    summary = summarize(parts)
    assert summary.errors == {"not_text": 8}
    assert [example["row"] for example in summary.examples["not_text"]] == [0, 1, 2]


@given(st.dictionaries(st.integers(0, 10**6), st.integers(1, 10**9)))
def test_a_histogram_counts_each_length_once_in_its_bin(lengths: dict[int, int]) -> None:
    found = histogram(Counter(lengths))
    edges, counts = found["edges"], found["counts"]
    assert len(edges) == len(counts) + 1 <= NUM_BINS + 1
    for number, count in enumerate(counts):
        inside = [n for length, n in lengths.items() if edges[number] <= length < edges[number + 1]]
        assert count == sum(inside)
    assert sum(counts) == sum(lengths.values())


def test_a_run_record_counts_its_own_rows_and_keeps_a_bounded_series() -> None:
    record = run_record(
        [progress(t, rows=t // 10, tokens=5 * t) for t in range(1, 1001)], "2026-01-01T00:00:00+00:00", {}
    )
    assert record["rows"] == 100
    assert record["tokens_per_s"] == pytest.approx(10)
    assert len(record["series"]) <= 402
    assert record["series"][-1] == [1000, 100, 10000]


def test_time_left_follows_the_rows_of_this_run() -> None:
    assert progress(10, rows=0, tokens=0).left_s is None
    assert progress(10, rows=20, tokens=0).left_s == pytest.approx(40)


REPORT: dict[str, Any] = {
    "name": "summaries",
    "model": "a/model",
    "state": "finished",
    "rows": {"total": 3, "done": 3, "ok": 2, "errors": 1},
    "errors": {"template_error": {"count": 1, "examples": [{"row": 2, "message": "<script>alert(1)</script> \ud800"}]}},
    "tokens": {"prompt": 30, "completion": 12},
    "finish_reasons": {"stop": 2},
    "lengths": {
        "prompt_tokens": histogram(Counter({10: 3})),
        "completion_tokens": histogram(Counter({5: 1, 7: 1})),
    },
    "index": {"kind": "Flat", "vectors": 2},
    "runs": [run_record([progress(t, rows=t, tokens=t) for t in (1, 2, 4)], "2026-01-01T00:00:00+00:00", {})],
}


def test_the_page_needs_no_script_and_no_network_and_escapes_what_rows_hold() -> None:
    page = render(REPORT, "model: a/model\n")
    assert not re.search(r"(src|href|url)\s*[=(]", page)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    page.encode("utf-8")


def test_the_page_shows_errors_lengths_and_throughput() -> None:
    page = render(REPORT, "model: a/model\n")
    for shown in ("template_error", "Prompt length in tokens", "Generation length in tokens", "Tokens a second, run 1"):
        assert shown in page
