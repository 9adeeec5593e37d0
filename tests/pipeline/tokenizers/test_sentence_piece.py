"""SentencePiece models, in tokenizer.model and in GGUF files, against the sentencepiece library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from pipeline.errors import UserError
from pipeline.tokenizer import load_tokenizer

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("bpe", {}),
    ("bpe", {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}),
    ("bpe", {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}),
    ("bpe", {"byte_fallback": False, "user_defined_symbols": ["<think>", "\n"]}),
    ("unigram", {}),
    ("unigram", {"normalization_rule_name": "nfkc", "add_dummy_prefix": False}),
    ("unigram", {"byte_fallback": False}),
    ("unigram", {"treat_whitespace_as_suffix": True}),
]
GGUF_SETTINGS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize(("kind", "settings"), MODELS)
def test_ids_and_text_equal_sentencepiece(
    kind: str,
    settings: dict[str, Any],
    piece_model: Callable[..., bytes],
    piece_folder: Callable[..., Path],
    hard_texts: list[str],
    streamed: Callable[..., str],
) -> None:
    model = piece_model(kind, **settings)
    theirs = SentencePieceProcessor.from_proto(model)
    ours = load_tokenizer(piece_folder(model))
    assert ours.vocab_size == theirs.get_piece_size() == 700
    for text in hard_texts:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text[:60]
        assert ours.decode(ids) == streamed(ours, ids) == theirs.decode(ids)


def test_byte_fallback_brings_any_text_back(
    piece_model: Callable[..., bytes], piece_folder: Callable[..., Path], hard_texts: list[str]
) -> None:
    tokenizer = load_tokenizer(piece_folder(piece_model("bpe", **GGUF_SETTINGS)))
    for text in hard_texts:
        if "▁" not in text:  # which SentencePiece takes for a space
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_roles_come_from_the_model_where_the_configuration_is_silent(
    piece_model: Callable[..., bytes], piece_folder: Callable[..., Path]
) -> None:
    tokenizer = load_tokenizer(piece_folder(piece_model("bpe")))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})
    assert dict(tokenizer.special_tokens) == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.chat_template is None


def test_the_configuration_says_what_goes_around_a_text(
    piece_model: Callable[..., bytes], piece_folder: Callable[..., Path]
) -> None:
    path = piece_folder(piece_model("bpe"), add_bos_token=True, add_eos_token=True, chat_template="{{ bos_token }}")
    tokenizer = load_tokenizer(path)
    bare = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [1, *bare, 2]
    assert tokenizer.encode("") == [1, 2]
    assert tokenizer.chat_template == "{{ bos_token }}"


@pytest.mark.parametrize("config", [{}, {"legacy": False}, {"legacy": True}, {"add_prefix_space": False}])
def test_parsed_text_equals_transformers(
    config: dict[str, Any], piece_model: Callable[..., bytes], piece_folder: Callable[..., Path]
) -> None:
    model = piece_model("bpe", **GGUF_SETTINGS)
    path = piece_folder(model, tokenizer_class="LlamaTokenizer", add_bos_token=True, **config)
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    # transformers drops the leading space of text that begins with one; SentencePiece and the older files don't
    for text in ("<s>user</s>x", "a<s>user</s>x<unk>", "</s>", "<s><s>é</s>", "the <s>the the"):
        assert ours.encode(text, parse_special=True) == theirs.encode(text), text


def test_added_tokens_are_matched_and_special_ones_only_on_request(
    piece_model: Callable[..., bytes], piece_folder: Callable[..., Path], streamed: Callable[..., str]
) -> None:
    model = piece_model("bpe", user_defined_symbols=["<turn>"], **GGUF_SETTINGS)
    turn = SentencePieceProcessor.from_proto(model).piece_to_id("<turn>")
    listed = {
        "700": {"content": "<|im_start|>", "special": True},
        "701": {"content": "<think>", "special": False},
        str(turn): {"content": "<turn>", "special": True},
    }
    tokenizer = load_tokenizer(piece_folder(model, added_tokens_decoder=listed))
    text = "a<|im_start|>b<think>c<turn>d"
    assert tokenizer.vocab_size == 702
    assert {700, 701, turn} <= set(tokenizer.encode(text, parse_special=True))
    plain = tokenizer.encode(text)
    assert not {700, turn} & set(plain)
    assert 701 in plain
    assert tokenizer.decode(plain) == streamed(tokenizer, plain) == text
    assert tokenizer.decode(tokenizer.encode(text, parse_special=True)) == "ab<think>cd"
    assert tokenizer.decode(tokenizer.encode(text, parse_special=True), skip_special_tokens=False) == text


def test_an_unknown_piece_shows_as_sentencepiece_shows_it_or_by_name(
    piece_model: Callable[..., bytes], piece_folder: Callable[..., Path]
) -> None:
    model = piece_model("bpe", byte_fallback=False)
    tokenizer = load_tokenizer(piece_folder(model))
    ids = tokenizer.encode("a☃b")
    assert 0 in ids
    assert tokenizer.decode(ids) == SentencePieceProcessor.from_proto(model).decode(ids) == "a ⁇ b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<unk>b"


def test_ids_past_the_vocabulary_stand_for_nothing(
    piece_model: Callable[..., bytes], piece_folder: Callable[..., Path], streamed: Callable[..., str]
) -> None:
    tokenizer = load_tokenizer(piece_folder(piece_model("bpe")))
    ids = tokenizer.encode("hello")
    assert tokenizer.decode([70_000, *ids, 700]) == streamed(tokenizer, [70_000, *ids, 700]) == "hello"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it has no vocabulary"),
        (b"not a model at all", "not a SentencePiece model|corrupt"),
        (b"\x0a\x03\x0a\x01a", "corrupt"),
    ],
)
def test_a_corrupt_model_is_refused_with_one_line(content: bytes, said: str, piece_folder: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=said) as refusal:
        load_tokenizer(piece_folder(content))
    assert "\n" not in str(refusal.value)


def test_a_truncated_model_is_refused(piece_model: Callable[..., bytes], piece_folder: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"SentencePiece model|corrupt"):
        load_tokenizer(piece_folder(piece_model("bpe")[:5000]))


@pytest.mark.parametrize(
    "settings", [{}, {"add_dummy_prefix": False}, {"user_defined_symbols": ["▁▁", "▁▁▁▁", "<think>"]}]
)
def test_a_gguf_vocabulary_gives_the_ids_and_text_of_the_model_it_was_made_from(
    settings: dict[str, Any],
    piece_model: Callable[..., bytes],
    piece_vocabulary_file: Callable[..., Path],
    hard_texts: list[str],
    streamed: Callable[..., str],
) -> None:
    model = piece_model("bpe", **GGUF_SETTINGS, **settings)
    theirs = SentencePieceProcessor.from_proto(model)
    ours = load_tokenizer(piece_vocabulary_file(model, add_space_prefix=settings.get("add_dummy_prefix", True)))
    for text in [*hard_texts, "a  b    c       d <think> e"]:
        ids = theirs.encode(text)
        assert ours.encode(text) == [1, *ids], text[:60]
        assert ours.decode(ids) == streamed(ours, ids) == theirs.decode(ids)


def test_a_gguf_vocabulary_follows_what_its_file_says(
    piece_model: Callable[..., bytes], piece_vocabulary_file: Callable[..., Path]
) -> None:
    model = piece_model("bpe", **GGUF_SETTINGS)
    path = piece_vocabulary_file(
        model, add_bos_token=False, add_eos_token=True, add_space_prefix=False, template="TEMPLATE", eot_token_id=5
    )
    tokenizer = load_tokenizer(path)
    begun = SentencePieceProcessor.from_proto(piece_model("bpe", add_dummy_prefix=False, **GGUF_SETTINGS))
    assert tokenizer.decode(tokenizer.encode("the")) == "the"
    assert tokenizer.encode("the")[-1] == 2
    assert tokenizer.encode("the")[0] not in {1, begun.piece_to_id("▁the")}
    assert tokenizer.chat_template == "TEMPLATE"
    assert tokenizer.eos_ids == {2, 5}
    assert tokenizer.bos_id == 1


def test_text_after_a_control_token_in_a_gguf_vocabulary_begins_as_any_text_does(
    piece_model: Callable[..., bytes], piece_vocabulary_file: Callable[..., Path]
) -> None:
    tokenizer = load_tokenizer(piece_vocabulary_file(piece_model("bpe", **GGUF_SETTINGS)))
    begun = tokenizer.encode("the end", add_special_tokens=False)
    assert tokenizer.encode("</s>the end", parse_special=True) == [1, 2, *begun]


def test_a_gguf_vocabulary_that_names_no_special_tokens_has_llamas(
    piece_model: Callable[..., bytes], vocabulary_file: Callable[..., Path]
) -> None:
    model = SentencePieceProcessor.from_proto(piece_model("bpe", **GGUF_SETTINGS))
    pieces = range(model.get_piece_size())
    path = vocabulary_file(
        model="llama",
        tokens=[model.id_to_piece(at) for at in pieces],
        scores=[model.get_score(at) for at in pieces],
        token_type=[2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)],
    )
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})
    assert tokenizer.encode("the") == [1, *model.encode("the")]


def test_scores_may_be_whole_numbers(
    piece_model: Callable[..., bytes], piece_vocabulary_file: Callable[..., Path]
) -> None:
    model = piece_model("bpe", **GGUF_SETTINGS)  # whose scores are 0, -1, -2, ...
    scores = [round(SentencePieceProcessor.from_proto(model).get_score(at)) for at in range(700)]
    tokenizer = load_tokenizer(piece_vocabulary_file(model, scores=scores))
    assert tokenizer.encode("the parameter") == load_tokenizer(piece_vocabulary_file(model)).encode("the parameter")


def test_phi3_control_tokens_take_the_white_space_after_them(
    piece_model: Callable[..., bytes], piece_vocabulary_file: Callable[..., Path]
) -> None:
    model = piece_model("bpe", control_symbols=["<|end|>"], **GGUF_SETTINGS)
    tokenizer = load_tokenizer(piece_vocabulary_file(model, architecture="phi3"))
    end = tokenizer.encode("<|end|>", parse_special=True)[1]
    begun = tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.encode("<|end|>\n\n the", parse_special=True) == [1, end, *begun]
    assert tokenizer.eos_ids == {2, end}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"scores": [0.0]}, "700 tokens but 1 scores"),
        ({"token_type": [6] * 700}, "700 byte tokens instead of 256"),
        ({"unknown_token_id": 700}, "unknown_token_id is 700, past the 700"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens holds int, not str"),
    ],
)
def test_a_bad_gguf_vocabulary_is_refused_with_one_line(
    keys: dict[str, Any], said: str, piece_model: Callable[..., bytes], piece_vocabulary_file: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=said):
        load_tokenizer(piece_vocabulary_file(piece_model("bpe", **GGUF_SETTINGS), **keys))
