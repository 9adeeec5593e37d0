"""A stranger's path through a job with the command alone: run, status, verify, query; one Ray start for all of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from jobs.cli import execute

pytestmark = pytest.mark.ray

BODIES = [
    "The with statement closes a file when the block is left, also by an exception.",
    "A tuple is an immutable sequence of values.",
    None,
    "The power operator binds more tightly than unary operators on its left.",
    "A coroutine suspends itself with await.",
    "Default values are evaluated when the function definition is executed.",
]


@dataclass(frozen=True)
class FinishedJob:
    folder: Path  # the current directory of all commands
    out: Path
    done: subprocess.CompletedProcess[str]


def gristmill(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jobs", *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def job(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> FinishedJob:
    folder = tmp_path_factory.mktemp("job")
    shutil.copytree(tiny_model("mixtral"), folder / "model")
    table = pa.table(
        {
            "key": [f"doc-{number}" for number in range(len(BODIES))],
            "body": BODIES,
            "when": [datetime(2026, 1, 1 + number) for number in range(len(BODIES))],
        }
    )
    pq.write_table(table, folder / "corpus.parquet")
    (folder / "job.yaml").write_text(
        "model: model\n"
        "input: {path: corpus.parquet, id: key}\n"
        "prompt: {column: body, chat: false}\n"
        "generate: {max_new_tokens: 4}\n"
        'embed: {template: "passage: {{ body }}", query_template: "passage: {{ text }}"}\n'
        "output: {path: out, columns: [body, when], rows_per_split: 4}\n"
    )
    return FinishedJob(folder, folder / "out", gristmill("run", "job.yaml", "--json", cwd=folder))


@pytest.fixture
def answer(
    job: FinishedJob, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, Any]]:
    """Runs a command with --json in the job's folder -> (exit status, document)."""
    monkeypatch.chdir(job.folder)

    def run(*arguments: str) -> tuple[int, Any]:
        status = execute([*arguments, "--json"])
        return status, json.loads(capfd.readouterr().out)

    return run


def test_run_prints_its_report_as_the_one_document(job: FinishedJob) -> None:
    assert job.done.returncode == 0, job.done.stderr
    report = json.loads(job.done.stdout)
    assert report == json.loads((job.out / "report.json").read_text())
    assert report["state"] == "finished"
    assert report["rows"] == {"total": 6, "done": 6, "ok": 5, "errors": 1}
    assert report["errors"]["not_text"]["examples"][0]["row"] == 2
    assert report["tokens"]["completion"] == 20
    assert report["index"]["vectors"] == 5
    assert (job.out / "report.html").read_text().startswith("<!doctype html>")


def test_no_progress_bar_is_drawn_where_there_is_no_terminal(job: FinishedJob) -> None:
    assert "\r" not in job.done.stderr
    assert "\x1b" not in job.done.stderr


def test_run_again_does_nothing(job: FinishedJob, answer: Callable[..., tuple[int, Any]]) -> None:
    before = {path: path.stat().st_mtime_ns for path in job.out.rglob("*") if path.suffix in (".parquet", ".faiss")}
    status, report = answer("run", "job.yaml")
    assert (status, report) == (0, json.loads(job.done.stdout))
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_status_counts_what_is_committed(answer: Callable[..., tuple[int, Any]]) -> None:
    status, found = answer("status", "out")
    assert status == 0
    assert found["state"] == "finished"
    assert found["rows"] == {"total": 6, "done": 6, "ok": 5, "errors": 1}
    assert found["splits"] == {"total": 2, "done": 2}
    assert found["index"]["current"]


def test_verify_holds_until_a_byte_changes(
    job: FinishedJob, answer: Callable[..., tuple[int, Any]], tmp_path: Path
) -> None:
    assert answer("verify", "out")[0] == 0
    shutil.copytree(job.out, tmp_path / "copy")
    part = tmp_path / "copy" / "parts" / "part-000000.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    status, found = answer("verify", str(tmp_path / "copy"))
    assert status == 1
    assert not found["ok"]
    assert any("part-000000.parquet" in problem for problem in found["problems"])


def test_a_row_s_own_text_finds_the_row(answer: Callable[..., tuple[int, Any]]) -> None:
    status, document = answer("query", "out", str(BODIES[3]), str(BODIES[4]), "-k", "2")
    assert status == 0
    first, second = document["results"]
    assert (first["query"], second["query"]) == (BODIES[3], BODIES[4])
    assert len(first["hits"]) == 2
    best = first["hits"][0]
    assert best["score"] == pytest.approx(1.0, abs=1e-4)
    assert (best["row"], best["id"], best["sample"]) == (3, "doc-3", 0)
    assert best["text"] == f"passage: {BODIES[3]}"
    assert best["columns"] == {"body": BODIES[3], "when": "2026-01-04T00:00:00"}
    assert second["hits"][0]["row"] == 4
    assert all(hit["row"] != 2 for result in document["results"] for hit in result["hits"])


def test_hits_come_best_first_and_no_more_than_there_are(answer: Callable[..., tuple[int, Any]]) -> None:
    _, document = answer("query", "out", "tuples", "-k", "50")
    scores = [hit["score"] for hit in document["results"][0]["hits"]]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)


def test_a_stored_vector_finds_its_row(
    job: FinishedJob, answer: Callable[..., tuple[int, Any]], tmp_path: Path
) -> None:
    rows = ds.dataset(job.out / "parts").to_table(columns=["row", "embedding"]).to_pylist()
    vectors = np.array([row["embedding"] for row in rows if row["row"] in (1, 5)], np.float32)
    np.save(tmp_path / "two.npy", vectors)
    np.save(tmp_path / "one.npy", vectors[0])
    _, two = answer("query", "out", "--vector", str(tmp_path / "two.npy"), "-k", "1")
    assert [result["hits"][0]["row"] for result in two["results"]] == [1, 5]
    _, one = answer("query", "out", "--vector", str(tmp_path / "one.npy"), "-k", "1")
    assert [result["hits"][0]["row"] for result in one["results"]] == [1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.ones(7, np.float32), "60"),
        (np.zeros(60, np.float32), "zeros"),
        (np.full(60, np.nan, np.float32), "NaN"),
        (np.array(["a"] * 60), "numbers"),
    ],
    ids=["another width", "zeros", "NaN", "text"],
)
def test_a_vector_that_can_t_be_compared_is_refused(
    content: Any, said: str, answer: Callable[..., tuple[int, Any]], tmp_path: Path
) -> None:
    np.save(tmp_path / "query.npy", content)
    status, document = answer("query", "out", "--vector", str(tmp_path / "query.npy"))
    assert status == 2
    assert said in document["error"]


def test_a_model_that_changed_since_the_index_was_made_is_refused(
    job: FinishedJob, answer: Callable[..., tuple[int, Any]]
) -> None:
    config = job.folder / "model" / "config.json"
    before = config.read_text()
    config.write_text(before.replace("10000", "20000"))
    try:
        assert config.read_text() != before
        status, document = answer("query", "out", "tuples")
    finally:
        config.write_text(before)
    assert status == 2
    assert "config.json" in document["error"]


def test_a_filter_leaves_rows_out_before_they_are_ranked(answer: Callable[..., tuple[int, Any]]) -> None:
    status, document = answer("query", "out", str(BODIES[1]), "-k", "2", "--filter", "when >= '2026-01-04'")
    assert status == 0
    (result,) = document["results"]
    assert {hit["row"] for hit in result["hits"]} < {3, 4, 5}
    assert {hit["job"] for hit in result["hits"]} == {"job"}
    status, document = answer("query", "out", "tuples", "--filter", "wen > 3")
    assert status == 2
    assert "there are body, when, row, id, sample, text, job" in document["error"]


def test_an_empty_query_is_refused(answer: Callable[..., tuple[int, Any]]) -> None:
    status, document = answer("query", "out", "")
    assert status == 2
    assert "query" in document["error"]


def test_words_for_people_name_the_row_and_show_the_text(
    job: FinishedJob, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(job.folder)
    assert execute(["query", "out", str(BODIES[1]), "-k", "1"]) == 0
    words = capfd.readouterr().out
    assert "row 1, doc-1" in words
    assert "passage: A tuple is an immutable sequence" in words
    assert execute(["status", "out"]) == 0
    assert "6 of 6" in capfd.readouterr().out
    assert execute(["verify", "out"]) == 0
    assert "is whole" in capfd.readouterr().out


def test_another_job_in_the_same_directory_is_refused(answer: Callable[..., tuple[int, Any]]) -> None:
    status, document = answer("run", "job.yaml", "--set", "generate.max_new_tokens=5")
    assert status == 2
    assert "generate.max_new_tokens" in document["error"]


def test_python_gives_the_same_rows_and_hits(job: FinishedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    import jobs

    monkeypatch.chdir(job.folder)
    result = jobs.run("job.yaml")
    assert result.report["rows"]["done"] == 6
    rows = result.dataset().to_table(columns=["row", "error_code"]).to_pydict()
    assert rows["row"] == list(range(6))
    assert rows["error_code"] == [None, None, "not_text", None, None, None]
    (found,) = result.search([str(BODIES[5])], k=1)
    assert found.hits[0].row == 5
