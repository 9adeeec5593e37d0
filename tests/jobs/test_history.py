"""How a run went over time is kept in bounded size, evenly, and through whatever ends the run."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.history import FEW_SAMPLES, MAX_RUNS, History, RunRecords, read_runs, run_record
from jobs.progress import Progress
from pipeline.job_folder import JobFolder


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


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    made = JobFolder(tmp_path / "out")
    made.create()
    return made


@given(st.integers(1, 3000), st.floats(0.01, 100))
def test_samples_are_few_and_evenly_spread_however_long_a_run_takes(count: int, every_s: float) -> None:
    history = History(max_samples=50)
    for number in range(count):
        history.add(progress(number * every_s, rows=number, tokens=number))
    samples = history.samples()
    assert len(samples) <= 51
    assert samples[-1].elapsed_s == (count - 1) * every_s
    gaps = [after.elapsed_s - before.elapsed_s for before, after in pairwise(samples[:-1])]
    assert not gaps or max(gaps) <= 2.01 * min(gaps)


def test_what_a_phase_came_to_is_kept_however_far_samples_are_apart() -> None:
    history = History(max_samples=10)
    for number in range(1, 1000):
        history.add(progress(number, rows=number, tokens=number))
    for number in range(1000, 1100):
        history.add(replace(progress(number, rows=999, tokens=999), phase="index"))
    assert run_record(history.samples(), "2026-01-01T00:00:00+00:00", {})["rows"] == 999


def test_a_run_record_counts_its_own_rows() -> None:
    record = run_record(
        [progress(t, rows=t // 10, tokens=5 * t) for t in range(1, 1001)], "2026-01-01T00:00:00+00:00", {"deaths": []}
    )
    assert record["rows"] == 100
    assert record["tokens_per_s"] == pytest.approx(10)
    assert {name: values[-1] for name, values in record["series"].items()} == {
        "seconds": 1000,
        "rows": 100,
        "prompt_tokens": 5000,
        "completion_tokens": 5000,
    }
    assert record["deaths"] == []


def test_time_left_follows_the_rows_of_this_run() -> None:
    assert progress(10, rows=0, tokens=0).left_s is None
    assert progress(10, rows=20, tokens=0).left_s == pytest.approx(40)


def record(number: int) -> dict[str, Any]:
    return run_record([progress(t, rows=t, tokens=number) for t in range(1, 201)], "2026-01-01T00:00:00+00:00", {})


def test_a_run_that_was_killed_is_in_the_records_as_far_as_it_was_written_down(folder: JobFolder) -> None:
    killed = RunRecords(folder)
    killed.keep(record(1))
    killed.keep(record(2))
    RunRecords(folder).keep(record(3))
    assert [run["prompt_tokens"] for run in read_runs(folder)] == [2, 3]


def test_runs_and_the_samples_of_old_ones_are_bounded(folder: JobFolder) -> None:
    for number in range(MAX_RUNS + 5):
        RunRecords(folder).keep(record(number))
    runs = read_runs(folder)
    assert [run["prompt_tokens"] for run in runs] == list(range(5, MAX_RUNS + 5))
    assert len(runs[-1]["series"]["rows"]) == 200
    assert len(runs[0]["series"]["rows"]) <= FEW_SAMPLES + 1
    assert runs[0]["series"]["rows"][-1] == 200


@pytest.mark.parametrize("content", ["", "[]", '{"runs": 3}', json.dumps({"runs": [3, {"series": {}}]})])
def test_records_that_something_damaged_are_left_out(folder: JobFolder, content: str) -> None:
    folder.runs_file.write_text(content)
    assert read_runs(folder) == []
    RunRecords(folder).keep(record(1))
    assert len(read_runs(folder)) == 1


def test_a_run_goes_on_where_its_record_can_t_be_written(folder: JobFolder, caplog: pytest.LogCaptureFixture) -> None:
    folder.runs_file.mkdir()
    with caplog.at_level(logging.WARNING):
        RunRecords(folder).keep(record(1))
    assert "is not kept" in caplog.text
