"""Which of several served indexes a directory means."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

import jobs.index.served
import workers.serving.index_client
from jobs.index.served import connect
from pipeline.errors import JobError, UserError

ROOT = Path(__file__).parents[3]


def test_one_that_is_just_being_started_does_not_hide_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def __init__(self, name: str) -> None:
            self.name = name
            if name in ("gone", str(tmp_path / "b")):
                raise UserError(f"no index is served as {name!r}")

        def output(self) -> str:
            if self.name == "starting":
                raise JobError("starting is still being started; ask again in a moment")
            return str(tmp_path / "a")

    monkeypatch.setattr(jobs.index.served, "ray_session", lambda *_, **__: nullcontext())
    monkeypatch.setattr(workers.serving.index_client, "IndexClient", Client)
    monkeypatch.setattr(workers.serving.index_client, "served_names", lambda: ["gone", "starting", "tour"])
    found = connect(tmp_path / "a", "192.0.2.2:45301")
    assert found._client.name == "tour"
    with pytest.raises(UserError, match="no index is served as"):
        connect(tmp_path / "b", "192.0.2.2:45301")


def test_a_client_that_nobody_closed_leaves_ray_before_the_interpreter_ends() -> None:
    script = """
from contextlib import ExitStack, contextmanager
from jobs.index.served import ServedIndex

@contextmanager
def session():
    try:
        yield
    finally:
        import colorsys  # which Python refuses when it has ended
        print("left")

with ExitStack() as stack:
    stack.enter_context(session())
    index = ServedIndex(None, stack.pop_all())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("left\n", "")
