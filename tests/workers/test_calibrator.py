"""What of the job's rows a calibration reads: texts as the job would run them, each once, within a number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.embedding import EmbeddedText
from workers.calibrator import _read, _request, _within
from workers.engine.request import EmbedRequest, GenerateRequest
from workers.settings import SamplePlace


def read(desk: Any, split: int, rows: int) -> list[list[Any]]:
    place = SamplePlace(split=desk.splits[split].to_json(), rows=rows)
    return list(_read(desk.runner._preparation, place))


def test_a_place_gives_prompts_and_passages_of_its_first_rows(desk: Callable[..., Any]) -> None:
    texts = ["one", "", "three", "four", *["more"] * 8]
    both = desk(texts, embed={"of": "prompt", "template": "{{ title }}"})
    found = read(both, 0, 4)
    assert [len(texts) for texts in found] == [2, 0, 2, 2], "row 1 has no text"
    tokenizer = both.runner._preparation._tokenizer
    assert [isinstance(text, EmbeddedText) for text in found[0]] == [False, True]
    assert tokenizer.decode(found[2][0]) == "user\nthree\nassistant\n", "as the chat template frames it"
    assert len(read(both, 1, 8)) == 4


def test_a_prompt_that_is_the_passage_is_read_once(desk: Callable[..., Any]) -> None:
    same = desk(["one", "two"], embed={"of": "prompt"}, prompt={"chat": False})
    (first, second) = read(same, 0, 2)
    assert [len(first), len(second)] == [1, 1]
    assert isinstance(first[0], EmbeddedText)


def test_a_place_is_left_when_it_has_given_enough_tokens_but_not_without_any() -> None:
    rows = [[[1] * 5], [[1] * 2, EmbeddedText([1] * 2)], [[1]]]
    assert list(_within(rows, 9)) == rows[:2]
    assert list(_within(rows, 3)) == rows[:1]
    assert list(_within([[], *rows], 3)) == [[], rows[0]]
    assert list(_within(rows, None)) == rows


def test_prompts_run_to_their_first_token_and_passages_to_their_end() -> None:
    prompt, passage = _request(3, [5, 6]), _request(4, EmbeddedText([7, 8, 9], pooled_from=1))
    assert isinstance(prompt, GenerateRequest)
    assert (prompt.request_id, prompt.params.max_new_tokens, prompt.params.n) == (3, 1, 1)
    assert isinstance(passage, EmbedRequest)
    assert (passage.token_ids, passage.vector.pooled_from) == ([7, 8, 9], 1)
