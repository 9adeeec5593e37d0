"""The short cut for ASCII text against the library, for every way of cutting words."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as LibraryBackend

from pipeline.tokenizers.ascii_words import ascii_pattern, ascii_words
from pipeline.tokenizers.pre_tokenizers import PRE_TOKENIZERS

QUICK = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

ASCII = st.one_of(
    st.text(st.characters(max_codepoint=127), max_size=40),
    st.text(st.sampled_from(" \t\n\r\x0b\x0c\x1c\x1f\x00'sStTreLlvVdDmM0123a.,!?(|/-$+<=>^~`_"), max_size=40),
)


@pytest.fixture(scope="module")
def library_model(tiny_tokenizer_dir: Path) -> models.BPE:
    return LibraryBackend.from_file(str(tiny_tokenizer_dir / "tokenizer.json")).model


def backend(model: models.BPE, pre_tokenizer: pre_tokenizers.PreTokenizer) -> LibraryBackend:
    made = LibraryBackend(model)
    made.pre_tokenizer = pre_tokenizer
    made.decoder = decoders.ByteLevel()
    return made


@pytest.mark.parametrize("name", sorted({way.patterns: name for name, way in PRE_TOKENIZERS.items()}.values()))
@QUICK
@given(text=ASCII)
def test_looked_up_words_equal_the_library(name: str, text: str, library_model: models.BPE) -> None:
    library = backend(library_model, PRE_TOKENIZERS[name].build())
    words = ascii_words(library)
    assert words is not None
    assert words.encode(text) == library.encode(text).ids
    assert words.encode(text) == library.encode(text).ids  # now from memory


def test_every_way_of_cutting_words_has_the_short_cut(library_model: models.BPE) -> None:
    for name, way in PRE_TOKENIZERS.items():
        assert ascii_words(backend(library_model, way.build())) is not None, name


@pytest.mark.parametrize(
    "spoil",
    [
        lambda library: setattr(library, "normalizer", normalizers.Lowercase()),
        lambda library: setattr(library, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda library: setattr(library, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda library: setattr(library, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda library: setattr(
            library,
            "pre_tokenizer",
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(" "), "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
        ),
        lambda library: setattr(library, "model", models.BPE(dropout=0.1)),
        lambda library: setattr(library, "model", models.WordLevel({"a": 0}, "a")),
    ],
)
def test_what_the_short_cut_would_get_wrong_goes_without(
    spoil: Callable[[LibraryBackend], None], library_model: models.BPE
) -> None:
    library = backend(library_model, pre_tokenizers.ByteLevel(add_prefix_space=False))
    spoil(library)
    assert ascii_words(library) is None


@pytest.mark.parametrize(
    "pattern", ["a.b", "^a", "[a&&b]", "[[:alpha:]]", r"\p{Han}+", r"\bword", "a*", "(?=a)", "(?<=a)b*", "["]
)
def test_a_pattern_of_uncertain_meaning_is_not_translated(pattern: str) -> None:
    assert ascii_pattern(pattern) is None


def test_classes_are_spelled_out() -> None:
    translated = ascii_pattern(r"(a|\p{Lu})[^\s\p{L}]$")
    assert translated is not None
    assert re.fullmatch(translated, "Z1")
    assert not re.fullmatch(translated, "z1")
    assert not re.fullmatch(translated, "ab")
