"""The command: exit statuses, one line on standard error, one JSON document on standard output, quick to start."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import resource
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import execute
from pipeline.errors import JobError, UserError

USAGE_ERRORS = [
    [],
    ["no-such-command"],
    ["run"],
    ["run", "--no-such-option"],
    ["run", "no-such-file.yaml"],
    ["run", "job.yaml", "--limit", "0"],
    ["plan", "no-such-file.yaml"],
    ["query", "no-such-directory", "text"],
    ["query", "no-such-directory"],
    ["query", "no-such-directory", "text", "--vector", "v.npy"],
    ["status", "no-such-directory"],
    ["embed", "corpus.txt", "--output", "out"],
    ["generate", "--model", "no-such-model", "--prompt", "hello"],
    ["upcycle", "no-such-model", "out"],
    ["upcycle", "no-such-model", "out", "--experts", "2", "--top-k", "3"],
    ["tokenizer"],
    ["tokenizer", "train", "no-such-corpus.txt", "out", "--kind", "bpe", "--vocab-size", "300"],
    ["tokenizer", "train", "corpus.txt", "out", "--kind", "wordpiece", "--vocab-size", "300"],
]


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_importing_the_command_loads_neither_torch_nor_ray() -> None:
    loaded = fresh("import sys, jobs.cli; print(*sys.modules)").stdout.split()
    assert "jobs.cli" in loaded
    heavy = {"torch", "ray", "pyarrow", "numpy", "pydantic", "transformers", "faiss", "rich"}
    assert heavy.isdisjoint(loaded)


def test_python_s_interface_is_loaded_when_it_is_asked_for_and_torch_only_by_those_who_compute() -> None:
    code = "import sys, jobs; print('jobs.client' in sys.modules, callable(jobs.run), 'torch' in sys.modules)"
    assert fresh(code).stdout.split() == ["False", "True", "False"]


def test_help_answers_well_under_a_second() -> None:
    def ask() -> tuple[str, float]:
        """What it says, and the processor time it takes, which a busy machine changes less than the time."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "jobs", "--help"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    said, seconds = ask()
    assert all(name in said for name in ("run", "query", "verify", "upcycle", "tokenizer"))
    assert seconds < 1.0 or min(ask()[1] for _ in range(2)) < 1.0


@pytest.mark.parametrize("arguments", USAGE_ERRORS, ids=" ".join)
def test_a_wrong_request_gets_one_line_and_exit_status_2(
    arguments: Sequence[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert execute(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("gristmill: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "no-such-file.yaml", "--json"],
        ["run", "--json"],
        ["query", "no-such-directory", "text", "--json"],
        ["status", "no-such-directory", "--json"],
        ["verify", "no-such-directory", "--json"],
    ],
    ids=" ".join,
)
def test_with_json_a_wrong_request_is_also_one_document(
    arguments: Sequence[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert execute(arguments) == 2
    out, err = capfd.readouterr()
    document = json.loads(out)
    assert document["exit_status"] == 2
    assert err == f"gristmill: {document['error']}\n"


def test_nothing_else_reaches_standard_output_while_json_is_written() -> None:
    done = fresh(
        "import subprocess, sys\n"
        "from jobs.terminal import reserved_stdout, write_json\n"
        "with reserved_stdout() as stream:\n"
        "    print('a library prints')\n"
        "    subprocess.run(['echo', 'a child prints'])\n"
        "    write_json({'answer': 1}, stream)\n"
        "print('afterwards')\n"
    )
    assert done.stdout == '{"answer": 1}\nafterwards\n'
    assert sorted(done.stderr.splitlines()) == ["a child prints", "a library prints"]


def test_json_with_a_lone_surrogate_can_be_written_and_read(capfd: pytest.CaptureFixture[str]) -> None:
    code = r"from jobs.terminal import *; import sys; write_json({'text': 'a\ud800b'}, sys.stdout)"
    assert json.loads(fresh(code).stdout) == {"text": "a\ud800b"}


@pytest.fixture
def run_is_replaced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Puts a function in the place of `jobs.client.run`."""
    import jobs.client

    return lambda function: monkeypatch.setattr(jobs.client, "run", function)


def a_job_file() -> str:
    Path("job.yaml").write_text("model: m\ninput: {path: corpus.txt}\ngenerate: {}\noutput: {path: out}\n")
    return "job.yaml"


@pytest.mark.parametrize(
    ("error", "exit_status", "said"),
    [
        (UserError("input: no such column"), 2, "no such column"),
        (JobError("no space left"), 1, "no space left"),
        (KeyboardInterrupt(), 130, "gristmill run job.yaml --limit 3"),
        (SystemExit(15), 130, "gristmill run job.yaml --limit 3"),
    ],
    ids=["wrong request", "failed job", "interrupted", "SIGTERM while Ray starts"],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_run_that_does_not_finish_says_why_in_one_line(
    error: BaseException,
    exit_status: int,
    said: str,
    as_json: bool,
    run_is_replaced: Callable[[Callable[..., Any]], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise error

    run_is_replaced(run)
    arguments = ["run", a_job_file(), "--limit", "3", *(["--json"] if as_json else [])]
    assert execute(arguments) == exit_status
    out, err = capfd.readouterr()
    assert said in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    if as_json:
        assert json.loads(out)["exit_status"] == exit_status
    else:
        assert out == ""


def test_embed_is_short_for_a_job_that_embeds_and_indexes(
    run_is_replaced: Callable[[Callable[..., Any]], None],
) -> None:
    asked: list[Any] = []

    def run(spec: Any, **_: Any) -> None:
        asked.append(spec)
        raise JobError("enough")

    run_is_replaced(run)
    execute(["embed", "corpus/*.parquet", "--model", "m", "--output", "out/index", "--column", "body"])
    (spec,) = asked
    assert spec.model == "m"
    assert spec.input.path == "corpus/*.parquet"
    assert spec.prompt.column == "body"
    assert spec.generate is None
    assert spec.index is not None
    assert spec.output.path == "out/index"


def test_run_takes_output_set_limit_and_retry_errors(run_is_replaced: Callable[[Callable[..., Any]], None]) -> None:
    asked: list[Any] = []

    def run(spec: Any, **options: Any) -> None:
        asked.append((spec, options))
        raise JobError("enough")

    run_is_replaced(run)
    options = [
        "--output",
        "elsewhere",
        "--set",
        "generate.n=2",
        "--set",
        "name=other",
        "--limit",
        "7",
        "--retry-errors",
    ]
    execute(["run", a_job_file(), *options])
    ((spec, given),) = asked
    assert (spec.output.path, spec.generate.n, spec.name) == ("elsewhere", 2, "other")
    assert (given["limit"], given["retry_errors"]) == (7, True)


def test_a_bar_with_rows_speed_and_time_left_is_drawn_on_a_terminal() -> None:
    code = (
        "from jobs.progress import Progress\n"
        "from jobs.terminal import ProgressDisplay\n"
        "with ProgressDisplay() as display:\n"
        "    display(Progress(phase='rows', rows_done=30, rows_total=120, rows_at_start=0, error_rows=0,\n"
        "                     prompt_tokens=9000, completion_tokens=1000, elapsed_s=10.0))\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    done = subprocess.run([sys.executable, "-c", code], stderr=theirs, stdout=subprocess.PIPE, check=True)
    os.close(theirs)
    drawn = b""
    with contextlib.suppress(OSError):  # a terminal that is closed ends so
        while piece := os.read(ours, 65536):
            drawn += piece
    os.close(ours)
    assert done.stdout == b""
    for shown in ("rows", "30/120", "1,000 tokens/s", "0:30 left"):
        assert shown in drawn.decode()


def test_a_trial_answers_with_as_many_tokens_and_such_weights_as_asked(
    tiny_model: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--model", str(tiny_model()), "--prompt", "the quick brown"]
    answers = []
    for options in ([], ["--max-new-tokens", "2"], ["--max-new-tokens", "2", "--dtype", "float32"]):
        assert execute([*arguments, *options]) == 0
        answers.append(capfd.readouterr().out.strip())
    assert answers[0].startswith(answers[1])
    assert len(answers[0]) > len(answers[1]) > 0
    assert answers[1] == answers[2]
    assert execute([*arguments, "--dtype", "float16"]) == 2
