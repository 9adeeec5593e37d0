"""Gemma 3's real vocabulary, 262,144 SentencePiece pieces in a GGUF file, against transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.weights

PATH = Path(__file__).parents[3] / ".cache" / "weights" / "gemma-3-270m-q4_k_m.gguf"


@pytest.fixture(scope="module")
def gemma() -> Tokenizer:
    assert PATH.is_file(), "make test-weights fetches it"
    return load_tokenizer(PATH)


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(PATH.parent, gguf_file=PATH.name)


def test_ids_and_text_equal_transformers(
    gemma: Tokenizer, reference: PreTrainedTokenizerFast, hard_texts: list[str], streamed: Callable[..., str]
) -> None:
    for text in [*hard_texts, "<start_of_turn>user\nHi<end_of_turn>\n<table><td>x</td>\n\n\n"]:
        if re.search(" {32}", text):  # see the test below
            continue
        ids = reference.encode(text)
        assert gemma.encode(text, parse_special=True) == ids, text[:60]
        assert gemma.decode(ids) == streamed(gemma, ids) == reference.decode(ids, skip_special_tokens=True)
        if "▁" not in text:
            assert gemma.decode(gemma.encode(text)) == text


def test_a_long_run_of_spaces_is_cut_longest_first_as_sentencepiece_cuts_user_defined_symbols(gemma: Tokenizer) -> None:
    longest, two = gemma.encode(" " * 31, add_special_tokens=False), gemma.encode("  ", add_special_tokens=False)
    assert len(longest) == len(two) == 1
    assert gemma.encode(" " * 64, add_special_tokens=False) == [*longest, *longest, *two]


def test_the_turns_end_is_the_texts_end_though_the_file_names_only_eos(gemma: Tokenizer) -> None:
    assert (gemma.vocab_size, gemma.bos_id) == (262_144, 2)
    assert gemma.eos_ids == {1, 106}
    assert gemma.encode("<end_of_turn>", parse_special=True) == [2, 106]
    assert 106 not in gemma.encode("<end_of_turn>")
