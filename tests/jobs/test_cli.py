"""The command: exit statuses, one line on standard error, one JSON document on standard output, quick to start."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs.cli import execute

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


def test_help_answers_well_under_a_second() -> None:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "jobs", "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - began < 1.0
    assert all(name in done.stdout for name in ("run", "query", "verify", "upcycle", "tokenizer"))


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
