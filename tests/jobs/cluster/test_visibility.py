"""What a node is asked before a job starts there, and what it says of what it doesn't see."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.cluster.visibility import expected, look
from pipeline.prompts import PromptSettings
from pipeline.source import Source
from workers.settings import EngineSettings, JobSettings, ShardSettings


@pytest.fixture
def asked(tiny_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The question about a job whose model, input and output lie in `tmp_path`."""
    monkeypatch.setattr("jobs.cluster.visibility.SHARED_S", 0.0)
    shutil.copytree(tiny_tokenizer_dir, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(3 << 20))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    attempts = tmp_path / "out" / "_attempts"
    attempts.mkdir(parents=True)
    (attempts / "nonce").write_text("once")
    job = JobSettings(
        out=str(tmp_path / "out"),
        source=Source.open(str(tmp_path / "rows.jsonl")).to_json(),
        prompt=PromptSettings(),
        on_too_long="error",
        date="2026-01-01T00:00:00+00:00",
        sampling=None,
        embed=None,
    )
    settings = ShardSettings(engine=EngineSettings(model_path=str(tmp_path / "model")), job=job)
    return expected(settings, attempts / "nonce")


def test_a_node_that_sees_all_answers_with_the_nonce(asked: dict[str, Any], tmp_path: Path) -> None:
    assert look(asked, "n1") == ""
    assert (tmp_path / "out" / "_attempts" / "nonce.n1").read_text() == "once"


def change(path: Path, how: str) -> None:
    if how == "gone":
        path.unlink() if path.is_file() else shutil.rmtree(path)
    else:
        path.write_text(how)


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        ("model/config.json", "gone", "can't see the model: .*/config.json: No such file"),
        ("model/config.json", "[]", "has another model: .*/config.json is not the file that it is here"),
        ("model/model.safetensors", "short", "has another model: .*/model.safetensors"),
        ("rows.jsonl", "gone", "can't see the input: .*/rows.jsonl is not there"),
        ("rows.jsonl", "longer than it was\n", r"has another input: .* has 19 bytes there and 14 here"),
        ("out", "gone", "doesn't share output.path: .*/_attempts is not there"),
        ("out/_attempts/nonce", "gone", "doesn't share output.path: .*/_attempts is another folder there"),
    ],
)
def test_what_a_node_does_not_see_is_named(
    asked: dict[str, Any], tmp_path: Path, name: str, how: str, said: str
) -> None:
    change(tmp_path / name, how)
    answer = look(asked, "n1")
    assert re.fullmatch(f"{said}.*", answer), answer


def test_other_code_is_told_before_anything_else(asked: dict[str, Any], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "model")
    assert "another version of gristmill" in look(asked | {"code": "other"}, "n1")
