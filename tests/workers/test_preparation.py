"""Rows to token ids: what is too long, what breaks, and what is left as it is."""

from __future__ import annotations

import pytest

from pipeline.embedding import EmbeddedText
from pipeline.errors import RowError
from workers.preparation import Preparation

TEXTS = [f"text number {row}" for row in range(600)]


def read(shard, split=0, **changes):
    return list(shard.runner._preparation.read(shard.assignment(split, **changes)))


def test_a_split_is_read_in_pieces_that_cover_its_rows(desk):
    shard = desk(TEXTS, rows_per_split=600, carried=("title",))
    pieces = read(shard)
    assert [(piece.first_row, piece.batch.num_rows) for piece in pieces] == [(0, 512), (512, 88)]
    assert [row for piece in pieces for row in piece.rows] == list(range(600))
    assert all(len(piece.prompts) == len(piece.rows) for piece in pieces)


def test_no_more_of_a_split_is_read_than_the_assignment_covers(desk):
    shard = desk(TEXTS, rows_per_split=600)
    pieces = read(shard, stop=3)
    assert [list(piece.rows) for piece in pieces] == [[0, 1, 2]]


def test_one_row_that_breaks_the_template_engine_fails_alone(desk, monkeypatch):
    shard = desk(TEXTS[:4])
    kind = shard.runner._preparation._prompts
    build = kind.builder.build

    def breaks(rows):
        if "text number 2" in rows.batch.column("body").to_pylist():
            raise ZeroDivisionError("an unforeseen row")
        return build(rows)

    monkeypatch.setattr(kind.builder, "build", breaks)
    (piece,) = read(shard)
    assert [isinstance(tokens, RowError) for tokens in piece.prompts] == [False, False, True, False]
    assert piece.prompts[2] == RowError("internal", "ZeroDivisionError: an unforeseen row")


def test_one_text_that_breaks_the_tokenizer_fails_alone(desk):
    shard = desk(TEXTS[:4])
    real = shard.runner._preparation._tokenizer

    class Breaking:
        def encode_batch(self, prompts):
            if any("number 1" in prompt.text for prompt in prompts):
                raise OverflowError("an unforeseen text")
            return real.encode_batch(prompts)

    shard.runner._preparation._tokenizer = Breaking()
    (piece,) = read(shard)
    assert [isinstance(tokens, RowError) for tokens in piece.prompts] == [False, True, False, False]


def test_a_prompt_may_fill_all_but_one_token_of_the_context_and_a_passage_all_of_it(desk):
    def outcome(num_tokens: int, **options) -> list:
        shard = desk(["a " * 20], max_context=num_tokens, prompt={"chat": False}, **options)
        (piece,) = read(shard)
        return (piece.prompts or []) + (piece.passages or [])

    (tokens,) = outcome(512)
    length = len(tokens)
    assert isinstance(outcome(length + 1)[0], list)
    assert outcome(length)[0].code == "prompt_too_long"
    embeds = {"generates": None, "embed": {"of": "prompt"}}
    assert isinstance(outcome(length, **embeds)[0], EmbeddedText)
    assert outcome(length - 1, **embeds)[0].code == "prompt_too_long"


def test_generated_text_is_tokenized_as_it_is(desk):
    preparation: Preparation = desk(TEXTS[:1]).runner._preparation
    plain, control, nothing = preparation.tokenize_generations(["text", "<|im_end|>", ""])
    assert isinstance(plain, EmbeddedText)
    assert len(control.ids) > 1, "the string of a control token is text"
    assert nothing.code == "empty_generation"


@pytest.mark.parametrize("length", [10, 63, 64, 65, 5000])
def test_truncation_leaves_no_prompt_too_long(desk, length):
    shard = desk(
        ["x " * length], max_context=64, on_too_long="truncate", prompt={"template": "A {{ body }} Z", "column": None}
    )
    (piece,) = read(shard)
    (tokens,) = piece.prompts
    assert len(tokens) <= 63
    if length == 5000:
        assert len(tokens) > 50
