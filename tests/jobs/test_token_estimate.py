"""Tokens are counted as shards will tokenize the rows, with the same limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.resolve import resolve
from jobs.specfile import parse_spec
from jobs.token_estimate import TokenEstimate, common_prefix, estimate_tokens
from pipeline.tokenizer import load_tokenizer

TEXTS = ["A tuple is immutable.", "The with statement closes a file.", "", "Await suspends a coroutine."]
EMBED = {"template": "passage {{ body }}", "pooling": "mean"}


@pytest.fixture
def estimate(job: Callable[..., dict[str, Any]]) -> Callable[..., TokenEstimate]:
    """`estimate(max_context=..., **settings)` of a job over TEXTS, whose prompts pass through no chat template."""

    def make(*, max_context: int = 512, **settings: Any) -> TokenEstimate:
        settings = {"prompt": {}, "embed": EMBED} | settings
        settings["prompt"] = {"column": "body", "chat": False} | settings["prompt"]
        return estimate_tokens(resolve(parse_spec(job(TEXTS, **settings))), max_context)

    return make


@pytest.fixture
def count(cheap_model: Callable[..., Path]) -> Callable[[str], int]:
    tokenizer = load_tokenizer(cheap_model())
    return lambda text: len(tokenizer.encode(text))


def test_tokens_are_those_that_the_job_will_read_and_embed(
    estimate: Callable[..., TokenEstimate], count: Callable[[str], int]
) -> None:
    read = [count(text) for text in TEXTS if text]
    embedded = [count(f"passage {text}") for text in TEXTS]
    found = estimate()
    assert found.sampled_rows == 4
    assert found.prompt == pytest.approx(sum(read) / len(read))
    assert found.passage == pytest.approx(sum(embedded) / len(embedded))
    assert found.errors == {"empty_prompt": 1}


def test_an_echo_counts_twice_and_a_passage_that_is_the_prompt_not_at_all(
    estimate: Callable[..., TokenEstimate],
) -> None:
    once = estimate().passage
    assert 2 * once < estimate(embed=EMBED | {"echo": True}).passage < 2 * once + 60
    assert estimate(embed={"pooling": "mean"}).passage == 0


def test_a_system_prompt_is_counted_once(estimate: Callable[..., TokenEstimate]) -> None:
    system = "You answer in few words and never in more than one sentence, whatever is asked. " * 3
    found = estimate(prompt={"system": system})
    assert 16 <= found.shared < found.prompt


def test_a_prompt_that_fills_the_context_is_too_long_and_a_passage_is_not(
    estimate: Callable[..., TokenEstimate], count: Callable[[str], int]
) -> None:
    longest = max(map(count, TEXTS))
    assert estimate(max_context=longest, embed={"pooling": "mean"}).errors == {"empty_prompt": 2, "prompt_too_long": 1}


def test_what_the_model_would_not_embed_whole_is_too_long(
    estimate: Callable[..., TokenEstimate], count: Callable[[str], int], cheap_model: Callable[..., Path]
) -> None:
    shortest, *longer = sorted(count(text) for text in TEXTS if text)
    assert shortest < longer[0]
    (cheap_model() / "sentence_bert_config.json").write_text(f'{{"max_seq_length": {shortest}}}')
    found = estimate(generate=None, embed={"pooling": "mean"})
    assert found.errors == {"empty_prompt": 1, "prompt_too_long": 2}
    assert found.passage == shortest
    cut = estimate(generate=None, embed={"pooling": "mean"}, prompt={"on_too_long": "truncate"})
    assert cut.errors == {"empty_prompt": 1}
    assert cut.passage == shortest


@pytest.mark.parametrize(
    ("sequences", "length"), [([], 0), ([[1, 2]], 0), ([[1, 2], [1, 2]], 2), ([[1, 2, 3], [1, 9]], 1), ([[], [1]], 0)]
)
def test_a_common_prefix_ends_where_any_sequence_differs(sequences: list[list[int]], length: int) -> None:
    assert common_prefix(sequences) == length
