"""What of a job travels to a cluster, and what is refused before anything is sent. No Ray."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from jobs.cli import execute
from jobs.ray_session import ray_session
from jobs.specfile import dump_spec, load_spec, parse_spec
from jobs.submitting.ray_jobs import ADDRESS_VARIABLES, _failure
from jobs.submitting.submission import (
    RAY_JOB_CONFIG,
    Submission,
    current_submission,
    new_submission_id,
    note_submission,
    read_submission,
    travelling_spec,
)
from pipeline.errors import UserError
from pipeline.job_folder import JobFolder

SETTINGS: dict[str, Any] = {
    "name": "tour",
    "model": "models/tiny",
    "input": {"path": ["a/*.parquet", "s3://bucket/b.parquet", "/c.parquet"]},
    "generate": {},
    "output": {"path": "out/tour"},
}
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens there
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.fixture(autouse=True)
def _no_cluster_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*ADDRESS_VARIABLES, RAY_JOB_CONFIG):
        monkeypatch.delenv(variable, raising=False)


def test_relative_paths_start_from_the_folder_that_is_named() -> None:
    spec = travelling_spec(parse_spec(SETTINGS), "/shared/team")
    assert spec.model == "/shared/team/models/tiny"
    assert spec.input.path == ("/shared/team/a/*.parquet", "s3://bucket/b.parquet", "/c.parquet")
    assert spec.output.path == "/shared/team/out/tour"
    other = parse_spec(SETTINGS | {"model": "hf://org/name", "input": {"job": "out/other"}})
    assert travelling_spec(other, "/shared").model == "hf://org/name"
    assert travelling_spec(other, "/shared").input.job == "/shared/out/other"


@pytest.mark.parametrize(
    ("key", "value", "folder", "said"),
    [
        ("model", "models/tiny", None, "model models/tiny: a relative path means nothing on another machine"),
        ("input.path", "[/a, b.parquet]", None, "input.path b.parquet: a relative path"),
        ("input", "{job: out/other}", None, "input.job out/other: a relative path"),
        ("output.path", "out", None, "output.path out: a relative path"),
        ("output.path", "~/out", "/shared", "output.path ~/out: it is not known whose home"),
        ("output.path", "s3://bucket/out", None, "output.path s3://bucket/out: output goes to a shared filesystem"),
        (
            "cluster.address",
            "10.0.0.1:6379",
            None,
            "cluster.address 10.0.0.1:6379: a submitted job runs",
        ),
        ("name", "tour", "shared", "--dir shared: must be an absolute path"),
    ],
)
def test_what_would_mean_something_else_on_the_cluster_is_refused(
    key: str, value: str, folder: str | None, said: str
) -> None:
    absolute = SETTINGS | {"model": "/m", "input": {"path": "/i"}, "output": {"path": "/o"}}
    with pytest.raises(UserError) as refused:
        travelling_spec(parse_spec(absolute, [f"{key}={value}"]), folder)
    assert str(refused.value).startswith(said)


@given(
    system=TEXTS, stop=st.lists(TEXTS, max_size=3), temperature=st.floats(0, 1e6), name=st.sampled_from(["1e3", "x"])
)
@example(system="a\x85b\u2028", stop=["\x85"], temperature=0.0, name="x")
def test_a_job_reads_as_the_same_job_where_it_arrives(
    system: str, stop: list[str], temperature: float, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sections = {"prompt": {"system": system, "column": name}, "generate": {"stop": stop, "temperature": temperature}}
    sent = travelling_spec(parse_spec(SETTINGS | sections), "/shared")
    path = tmp_path_factory.getbasetemp() / "job.yaml"
    path.write_text(dump_spec(sent), encoding="utf-8")
    assert load_spec(path) == sent


def test_only_what_was_set_is_sent_so_that_another_version_may_have_other_settings() -> None:
    assert set(yaml.safe_load(dump_spec(parse_spec(SETTINGS)))) == set(SETTINGS)


def test_the_name_of_a_submission_is_fit_for_a_file_and_never_the_same() -> None:
    assert new_submission_id("tour").startswith("tour-")
    assert new_submission_id("Wörter/und..mehr").startswith("W-rter-und..mehr-")
    assert new_submission_id("…").startswith("job-")
    assert new_submission_id("tour") != new_submission_id("tour")


def test_a_job_directory_remembers_its_submission_until_it_is_run_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = JobFolder(tmp_path)
    folder.create()
    note_submission(folder)
    assert read_submission(tmp_path) is None
    metadata = {
        "job_submission_id": "tour-1",
        "gristmill_address": "http://head:8265",
        "gristmill_command": "gristmill submit tour.yaml",
        "gristmill_version": "0.1.0",
    }
    monkeypatch.setenv(RAY_JOB_CONFIG, json.dumps({"metadata": metadata}))
    note_submission(folder)
    expected = Submission(
        id="tour-1", address="http://head:8265", command="gristmill submit tour.yaml", version="0.1.0"
    )
    assert read_submission(tmp_path) == expected
    monkeypatch.setenv(RAY_JOB_CONFIG, json.dumps({"metadata": {"job_submission_id": "rayjob-x"}}))
    assert current_submission() == Submission(id="rayjob-x")
    monkeypatch.delenv(RAY_JOB_CONFIG)
    note_submission(folder)
    assert read_submission(tmp_path) is None


def test_a_directory_whose_submission_can_t_be_read_counts_as_run_by_hand(tmp_path: Path) -> None:
    for content in ("", "{}", "[]", '{"id": "x"}'):
        (tmp_path / "submission.json").write_text(content)
        assert read_submission(tmp_path) is None


JOB = "model: /m\ninput: {path: /i}\ngenerate: {}\noutput: {path: /o}\n"


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        (JOB, ["submit", "job.yaml"], "which cluster? Name its dashboard with --address"),
        (JOB, ["submit", "job.yaml", "--address", NOWHERE], f"--address {NOWHERE}: nothing answers there"),
        (JOB, ["submit", "job.yaml", "--address", "head:6379"], "--address head:6379: name the cluster's dashboard"),
        (JOB, ["submit", "job.yaml", "--address", "http://"], "--address http://: nothing answers there"),
        (JOB, ["submit", "job.yaml", "--address", NOWHERE, "--set", "k=1"], "--set k=1: unknown key `k`"),
        ("model: [", ["submit", "job.yaml", "--address", NOWHERE], "job.yaml, line 1: not valid YAML"),
        (JOB, ["submit", "no.yaml", "--address", NOWHERE], "no.yaml: no such job file"),
        (JOB, ["status", "tour-1"], "tour-1: no such job directory; for a submitted job, name its cluster"),
        (JOB, ["status", "tour-1", "--address", NOWHERE], f"--address {NOWHERE}: nothing answers there"),
        (JOB, ["logs", "tour-1"], "which cluster?"),
        (JOB, ["cancel", "tour-1"], "which cluster?"),
        (JOB, ["cancel", "."], ".: the last run of this job was not submitted to a cluster"),
        (JOB, ["logs", "."], ".: no log: the job was not submitted to a cluster"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_wrong_before_anything_is_sent_is_said_in_one_line(
    text: str,
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(text)
    assert execute(arguments) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"gristmill: {said}")


def test_the_environment_names_the_cluster_and_is_named_where_it_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert execute(["cancel", "tour-1"]) == 2
    assert "RAY_ADDRESS head:6379: name the cluster's dashboard" in capfd.readouterr().err
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", NOWHERE)
    assert execute(["status", "tour-1"]) == 2
    assert f"RAY_API_SERVER_ADDRESS {NOWHERE}: nothing answers there" in capfd.readouterr().err


def test_the_log_of_a_job_that_was_run_by_hand_is_its_run_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.log").write_text("replica 0 died\n")
    assert execute(["logs", str(tmp_path)]) == 0
    assert capfd.readouterr().out == "replica 0 died\n"
    assert execute(["logs", str(tmp_path), "--follow"]) == 2
    assert f"tail -f {tmp_path}/run.log" in capfd.readouterr().err


def test_the_reason_of_a_failure_is_found_in_the_log_that_ray_quotes() -> None:
    quoted = "Job entrypoint command failed with exit code {}, last available logs (truncated to 20,000 chars):\n{}"
    log = "job_manager.py:581 -- Runtime env is setting up.\ngristmill: model: /m: no such file or folder\n\n"
    assert _failure(2, quoted.format(2, log)) == "model: /m: no such file or folder"
    assert _failure(1, quoted.format(1, "Traceback\nKeyError: 3\n")) == "KeyError: 3"
    assert "no command gristmill on the cluster's head" in _failure(
        127, quoted.format(127, "/bin/sh: 1: gristmill: ...")
    )
    assert _failure(None, "") == "it does not say why"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://head:8265", "that is a dashboard"),
        ("ray://head:10001", "an address of Ray's head is HOST:PORT"),
        ("head", "an address of Ray's head is HOST:PORT"),
        ("head:70000", "an address of Ray's head is HOST:PORT"),
        ("nowhere.invalid:6379", "nobody answers there"),
    ],
)
def test_what_is_no_ray_to_join_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, address: str, expected: str
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests' Ray may be connected
    with pytest.raises(UserError, match=rf"cluster.address {address}: {expected}"), ray_session(address, num_cpus=1):
        pass


def test_an_address_where_no_ray_is_any_more_is_one_line_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("jobs.ray_session.REACH_S", 0.3)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        with (
            pytest.raises(UserError, match=rf"cluster.address {address}: nobody answers there \(.*refused\)"),
            ray_session(address, num_cpus=1),
        ):
            pass
