"""Whole jobs on a real Ray: what they leave behind, how they go on, and what they refuse."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from jobs.client import JobInterrupted
from pipeline.audit import audit
from pipeline.errors import JobError, UserError

pytestmark = pytest.mark.ray

TEXTS = [f"text number {row}" for row in range(40)]


def test_a_job_leaves_parts_commits_an_index_and_a_report(job, run_job, rows_of):
    seen = []
    result = run_job(job(TEXTS), on_progress=seen.append)
    out = result.out
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == [
        "_attempts",
        "commits",
        "index",
        "job.json",
        "parts",
        "plan.json",
        "report.html",
        "report.json",
        "run.log",
        "runs.json",
    ]
    assert list((out / "_attempts").iterdir()) == []
    rows = rows_of(out)
    assert [row["row"] for row in rows] == list(range(40))
    assert result.dataset().count_rows() == 40
    assert [row["body"] for row in rows] == TEXTS, "the column that the prompt is made of is carried over"
    assert result.report["rows"] == {"total": 40, "done": 40, "ok": 40, "errors": 0}
    run = result.report["runs"][-1]
    assert run["rows"] == run["series"]["rows"][-1] == 40
    assert run["first_token_s"] > 0
    assert run["deaths"] == []
    assert (seen[-1].rows_done, seen[-1].rows_total) == (40, 40)
    assert [p.rows_done for p in seen] == sorted(p.rows_done for p in seen)
    found = audit(out)
    assert found.problems == ()
    stored = json.loads((out / "job.json").read_text())
    assert stored["spec"]["output"]["columns"] == ["body"]


def test_a_job_that_is_done_is_left_alone(job, run_job, monkeypatch):
    settings = job(TEXTS)
    first = run_job(settings)
    stamps = {path: path.stat().st_mtime_ns for path in first.out.rglob("*") if path.is_file() and path.name != ".lock"}
    monkeypatch.setattr("jobs.fleet.Fleet.start", lambda *_: pytest.fail("workers are started"))
    assert run_job(settings).report == first.report
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    (first.out / "index" / "rows.parquet").unlink()
    run_job(settings)
    assert audit(first.out).ok, "an index that is missing is made again, and needs no workers"


def test_the_number_of_replicas_does_not_change_a_row(job, run_job, tmp_path, rows_of):
    one = run_job(job(TEXTS))
    output = {"path": str(tmp_path / "other"), "rows_per_split": 4}
    two = run_job(job(TEXTS, cluster={"threads": 1, "replicas": 2}, output=output))
    assert rows_of(one.out) == rows_of(two.out)


def test_bad_rows_become_error_rows_and_nothing_else_is_touched(job, run_job, rows_of):
    bad = {3: None, 9: "", 17: "NAN", 21: "FAIL", 30: "long " * 600, 33: "REFUSE", 34: "SILENT"}
    texts = [bad.get(row, text) for row, text in enumerate(TEXTS)]
    result = run_job(job(texts))
    rows = rows_of(result.out)
    assert [row["row"] for row in rows] == list(range(40))
    assert {row["row"]: row["error_code"] for row in rows if row["error_code"]} == {
        3: "not_text",
        9: "empty_prompt",
        17: "nonfinite",
        21: "nonfinite",
        30: "prompt_too_long",
        33: "internal",
        34: "empty_generation",
    }
    assert result.report["rows"]["errors"] == 7
    assert result.report["index"]["vectors"] == 2 * 33


def test_too_many_bad_rows_fail_the_job_and_keep_what_is_committed(job, run_job, rows_of):
    texts = ["FAIL" if row % 4 else text for row, text in enumerate(TEXTS)]
    settings = job(texts)
    with pytest.raises(JobError, match=r"of \d+ rows failed \(75%\) and limits.max_error_rate is 0.5"):
        run_job(settings)
    assert rows_of(settings["output"]["path"])
    result = run_job(settings | {"limits": {"max_error_rate": 0.8}})
    assert result.report["rows"]["errors"] == 30


def test_a_limit_runs_the_first_rows_and_leaving_it_out_goes_on(job, run_job, tmp_path, rows_of):
    settings = job(TEXTS)
    limited = run_job(settings, limit=13)
    assert [row["row"] for row in rows_of(limited.out)] == list(range(13))
    assert limited.report["index"]["vectors"] == 26
    whole = run_job(settings)
    undisturbed = run_job(settings | {"output": {"path": str(tmp_path / "other"), "rows_per_split": 8}})
    assert rows_of(whole.out) == rows_of(undisturbed.out)
    assert whole.report["index"]["vectors"] == 80
    assert sorted(path.name for path in (whole.out / "commits").iterdir()) == [
        "000000.json",
        "000001.r1.json",
        "000002.json",
        "000003.json",
        "000004.json",
    ]


def test_failed_rows_run_again_when_that_is_asked_for(job, run_job, cheap_model, rows_of):
    texts = ["REFUSE" if row in (3, 20) else text for row, text in enumerate(TEXTS)]
    settings = job(texts)
    first = run_job(settings)
    assert [row["row"] for row in rows_of(first.out) if row["error_code"]] == [3, 20]
    assert run_job(settings).report == first.report, "not unless it is asked for"
    cheap_model(refuses=False)
    again = run_job(settings, retry_errors=True)
    assert [row["row"] for row in rows_of(again.out) if row["error_code"]] == []
    assert [row["row"] for row in rows_of(again.out)] == list(range(40))
    assert again.report["index"]["vectors"] == 80
    revised = {path.name for path in (again.out / "commits").iterdir() if ".r1" in path.name}
    assert revised == {"000000.r1.json", "000002.r1.json"}


def test_a_row_that_kills_its_worker_is_found_and_the_job_goes_on(job, run_job, rows_of):
    texts = ["DIE" if row == 9 else text for row, text in enumerate(TEXTS[:16])]
    result = run_job(job(texts, output={"path": job(texts)["output"]["path"], "rows_per_split": 2}))
    rows = rows_of(result.out)
    assert [row["row"] for row in rows] == list(range(16))
    assert {row["row"]: row["error_code"] for row in rows if row["error_code"]} == {9: "worker_killed"}
    deaths = result.report["runs"][-1]["deaths"]
    assert 4 <= len(deaths) <= 6
    assert all("died" in death["reason"] and death["recovered_after_s"] > 0 for death in deaths)


def test_workers_that_break_or_fall_silent_are_replaced(job, run_job, cheap_model, monkeypatch, tmp_path, rows_of):
    monkeypatch.setattr("workers.replica.SILENCE_S", 4.0)
    cheap_model(once=str(tmp_path / "once"), rows_a_step=1)
    result = run_job(job(["BREAK", "HANG", *TEXTS[:6]]))
    assert [row["error_code"] for row in rows_of(result.out)] == [None] * 8
    broken, silent = result.report["runs"][-1]["deaths"]
    assert broken["reason"] == "RuntimeError: this step breaks"
    assert "has said nothing for" in silent["reason"]


def test_a_job_gives_what_the_engine_gives_by_itself(tiny_model, job, run_job, rows_of):
    from workers.engine import Engine, SamplingParams

    model = tiny_model("mixtral")
    generate = {"max_new_tokens": 6, "temperature": 0.8, "top_k": 50, "seed": 3, "n": 2}
    settings = job(TEXTS[:20], model=str(model), generate=generate, embed={"pooling": "last"})
    prompt = {"template": "About {{ body }}:", "chat": False}
    result = run_job(
        settings | {"prompt": prompt, "engine": {"kv_cache_bytes": "64MiB"}},
        engine_factory="workers.engine_factory:load_engine",
    )
    rows = rows_of(result.out)
    engine = Engine.from_checkpoint(model, dtype="float32", kv_cache_bytes=1 << 26)
    prompts = [f"About {text}:" for text in TEXTS[:20]]
    outputs = engine.generate(prompts, SamplingParams(**generate), keys=range(20))
    assert [(row["row"], row["sample"], row["text"], row["finish_reason"]) for row in rows] == [
        (output.prompt_index, output.sample, output.text, output.finish_reason) for output in outputs
    ]
    vectors = engine.embed(prompts, pooling="last")
    stored = [row["embedding"] for row in rows if row["sample"] == 0]
    assert abs(vectors - stored).max() < 1e-5
    (hits,) = result.search([prompts[7]], k=3)
    assert hits.hits[0].row == 7


def test_a_signal_stops_the_job_and_running_it_again_goes_on(job, run_job, cheap_model, rows_of):
    cheap_model(step_s=0.2, rows_a_step=2)
    settings = job(TEXTS, embed=None)
    out = Path(settings["output"]["path"])

    def stop(progress) -> None:
        if list(out.glob("commits/*.json")):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(JobInterrupted):
        run_job(settings, on_progress=stop)
    assert 0 < len(rows_of(out)) < 40
    cheap_model()
    result = run_job(settings)
    assert [row["row"] for row in rows_of(result.out)] == list(range(40))


def test_what_no_worker_can_load_is_the_users_error_in_one_line(job, run_job):
    settings = job(TEXTS, prompt={"column": "body", "chat": True})
    for file in Path(settings["model"]).iterdir():
        if "chat" in file.name:
            file.unlink()
    with pytest.raises(UserError, match=r"prompt\.chat is true, but the model has no chat template$"):
        run_job(settings)
