"""Larger real weights: Gemma 3 270M in GGUF, which `make test-weights` fetches."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.cli import execute
from pipeline.tokenizer import load_tokenizer

FILE = Path(__file__).parents[2] / ".cache" / "weights" / "gemma-3-270m-q4_k_m.gguf"

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def gemma() -> Path:
    if not FILE.exists():
        pytest.fail(f"{FILE} is missing: run `make test-weights`, which fetches it")
    return FILE


def test_a_vocabulary_of_262_thousand_pieces_is_read_from_gguf(gemma: Path) -> None:
    tokenizer = load_tokenizer(gemma)
    assert tokenizer.vocab_size == 262_144
    assert tokenizer.bos_id == 2
    text = "  Zwei Löwen — 二匹のライオン 🦁\n\tx = f(y)"
    ids = tokenizer.encode(text)
    assert ids[0] == 2
    assert tokenizer.decode(ids) == text


def test_its_control_tokens_are_only_parsed_where_they_may_be(gemma: Path) -> None:
    tokenizer = load_tokenizer(gemma)
    text = "<start_of_turn>user"
    assert len(tokenizer.encode(text, parse_special=True)) == 3
    assert len(tokenizer.encode(text, parse_special=False)) > 3


def test_it_writes_on_after_a_prompt(gemma: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert execute(["generate", "--model", str(gemma), "--prompt", "The capital of France is"]) == 0
    out, _ = capfd.readouterr()
    assert out.strip()
