"""Where added tokens are found, against the tokenizers library; and what happens when the library fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken as LibraryToken
from tokenizers import Tokenizer as LibraryBackend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from pipeline.errors import RowError
from pipeline.tokenizers.added_tokens import AddedToken, AddedTokens, trie_pattern
from pipeline.tokenizers.checkpoint import CheckpointFacts
from pipeline.tokenizers.library import LibraryTokenizer

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
STRINGS = ["<s>", "<|a|>", "<|ab|>", "<|a", "tok", "x", "  ", "é<", "<s", "s>"]

TOKENS = st.lists(
    st.builds(
        LibraryToken,
        st.sampled_from(STRINGS),
        special=st.booleans(),
        lstrip=st.sampled_from([False, False, False, True]),
        rstrip=st.sampled_from([False, False, False, True]),
        single_word=st.sampled_from([False, False, False, True]),
        normalized=st.sampled_from([False, False, True]),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda token: token.content,
)
TEXTS = st.lists(st.sampled_from([*STRINGS, *"<|>as xtok_-\né"]), max_size=9).map("".join)


def backend(tokens: list[LibraryToken], *, normalized: bool) -> LibraryBackend:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: at for at, text in enumerate([*alphabet, "ĠĠ", "<|"])}
    made = LibraryBackend(models.BPE(vocabulary, [("Ġ", "Ġ"), ("<", "|")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if normalized:
        made.normalizer = normalizers.NFC()
    for token in tokens:
        (made.add_special_tokens if token.special else made.add_tokens)([token])
    return made


FACTS = CheckpointFacts(bos_id=None, eos_ids=frozenset(), chat_template=None, digest="")


@QUICK
@given(tokens=TOKENS, text=TEXTS, normalized=st.booleans())
def test_tokens_of_any_sort_are_found_where_the_library_finds_them(
    tokens: list[LibraryToken], text: str, normalized: bool
) -> None:
    ours = LibraryTokenizer(backend(tokens, normalized=normalized), FACTS)
    for parse_special in (True, False):
        library = backend(tokens, normalized=normalized)
        library.encode_special_tokens = not parse_special
        try:
            expected = library.encode(text).ids
        except BaseException as error:  # the library fails on a few of these itself
            if type(error).__name__ != "PanicException":
                raise
            continue
        assert ours.encode(text, parse_special=parse_special) == expected


def test_a_row_on_which_the_library_fails_takes_no_other_with_it(prompt: Callable[..., Any]) -> None:
    tokens = [LibraryToken("<s>", special=True, rstrip=True), LibraryToken("  ", special=True, lstrip=True)]
    tokenizer = LibraryTokenizer(backend(tokens, normalized=False), FACTS)
    results = tokenizer.encode_batch([prompt(text=text, parse_special=True) for text in ("é", "é<s>   é", "two")])
    assert [isinstance(result, RowError) for result in results] == [False, True, False]
    assert isinstance(results[1], RowError)
    assert results[1].code == "internal"


def added(*texts: str, special: bool = True) -> AddedTokens:
    return AddedTokens(AddedToken(text=text, token_id=at, special=special) for at, text in enumerate(texts))


def test_the_longest_of_several_strings_is_found() -> None:
    found = added("<a", "<a>", "<ab>").find("<a<a><ab><abc>", parse_special=True)
    assert [(match.start, match.end, match.token_id) for match in found] == [
        (0, 2, 0),
        (2, 5, 1),
        (5, 9, 2),
        (9, 11, 0),
    ]


def test_an_empty_literal_span_is_none() -> None:
    tokens = added("<a>")
    assert len(tokens.find("<a>", parse_special=True, literal=((1, 1), (3, 3)))) == 1
    assert not tokens.control_touches("<a>", ((1, 1),))


@pytest.mark.parametrize(("span", "touches"), [((0, 1), False), ((1, 2), True), ((3, 4), True), ((4, 5), False)])
def test_touching_is_sharing_a_character(span: tuple[int, int], touches: bool) -> None:
    assert added("<a>", "<a>b").control_touches(".<a>.", (span,)) is touches


def test_thousands_of_strings_make_a_pattern_that_is_quick() -> None:
    words = [f"<unused{number}>" for number in range(6000)]
    tokens = added(*words)
    text = "<unused5999> <unused> " * 2000
    assert len(tokens.find(text, parse_special=True)) == 2000
    assert trie_pattern(["<a>", "<ab>"]) == "<a(?:>|b>)"
