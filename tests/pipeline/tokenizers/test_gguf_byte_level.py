"""Byte-level vocabularies in GGUF files, against transformers and the tokenizers library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as LibraryBackend
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from pipeline.errors import UserError
from pipeline.tokenizer import Tokenizer, load_tokenizer
from pipeline.tokenizers.pre_tokenizers import PRE_TOKENIZERS


@pytest.fixture(scope="module")
def reference(smollm_path: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(smollm_path.parent, gguf_file=smollm_path.name)


@pytest.fixture(scope="module")
def published(reference: PreTrainedTokenizerFast) -> LibraryBackend:
    """SmolLM2's tokenizer as its tokenizer.json has it: transformers leaves its digits step out when reading GGUF."""
    backend = LibraryBackend.from_str(reference.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return backend


def test_smollm_gives_the_ids_that_its_own_tokenizer_gives(
    smollm: Tokenizer, published: LibraryBackend, hard_texts: list[str]
) -> None:
    for text in hard_texts:
        assert smollm.encode(text, parse_special=True) == published.encode(text).ids, text[:60]


def test_smollm_gives_the_ids_that_transformers_gives_where_no_digit_follows_white_space(
    smollm: Tokenizer, reference: PreTrainedTokenizerFast, hard_texts: list[str]
) -> None:
    texts = [text for text in hard_texts if not any(character.isnumeric() for character in text)]
    assert len(texts) > 15
    for text in texts:
        assert smollm.encode(text, parse_special=True) == reference.encode(text), text[:60]


def test_smollm_text_comes_back_whole_and_as_transformers_decodes_it(
    smollm: Tokenizer, reference: PreTrainedTokenizerFast, hard_texts: list[str]
) -> None:
    for text in hard_texts:
        ids = smollm.encode(text)
        assert smollm.decode(ids) == text
        assert smollm.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_smollm_roles_end_of_text_and_chat_template_come_from_the_file(
    smollm: Tokenizer, reference: PreTrainedTokenizerFast
) -> None:
    assert smollm.vocab_size == len(reference) == 49152
    assert smollm.bos_id == reference.bos_token_id == 1
    assert smollm.eos_ids == {reference.eos_token_id} == {2}
    assert smollm.chat_template == reference.chat_template
    assert smollm.special_tokens["bos_token"] == reference.bos_token == "<|im_start|>"
    assert smollm.special_tokens["unk_token"] == reference.unk_token


SHARED_WITH_TRANSFORMERS = sorted(set(GGUF_PRE_TOKENIZER_SPLITS) & set(PRE_TOKENIZERS))


def test_names_that_mean_the_same_to_transformers_mean_the_same_here() -> None:
    for name in SHARED_WITH_TRANSFORMERS:
        alike = {
            other
            for other in SHARED_WITH_TRANSFORMERS
            if PRE_TOKENIZERS[other].patterns == PRE_TOKENIZERS[name].patterns
        }
        split = GGUF_PRE_TOKENIZER_SPLITS[name]
        assert alike == {other for other in SHARED_WITH_TRANSFORMERS if GGUF_PRE_TOKENIZER_SPLITS[other] == split}


@pytest.mark.parametrize("name", ["llama-bpe", "tekken", "qwen2", "qwen35", "gpt-4o"])
def test_a_way_of_cutting_words_that_transformers_knows_gives_its_ids(
    name: str, byte_level_file: Callable[..., Path], hard_texts: list[str]
) -> None:
    path = byte_level_file(pre=name, add_bos_token=True)
    ours = load_tokenizer(path)
    theirs = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    backend = LibraryBackend.from_str(theirs.backend_tokenizer.to_str())
    backend.model.ignore_merges = PRE_TOKENIZERS[name].whole_words  # which transformers leaves out, llama.cpp does not
    for text in hard_texts:
        assert ours.encode(text, parse_special=True) == backend.encode(text).ids, text[:60]


@pytest.mark.parametrize("name", sorted({way.patterns: name for name, way in PRE_TOKENIZERS.items()}.values()))
def test_every_way_of_cutting_words_loses_nothing(
    name: str, byte_level_file: Callable[..., Path], hard_texts: list[str], streamed: Callable[..., str]
) -> None:
    tokenizer = load_tokenizer(byte_level_file(pre=name))
    for text in hard_texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == streamed(tokenizer, ids) == text


@pytest.mark.parametrize(("pre", "added"), [("llama-bpe", [1]), ("tekken", [1]), ("qwen2", []), ("gpt-2", [])])
def test_a_file_that_does_not_say_gets_the_beginning_of_text_token_that_its_kind_has(
    pre: str, added: list[int], byte_level_file: Callable[..., Path]
) -> None:
    assert load_tokenizer(byte_level_file(pre=pre)).encode("") == added


def test_what_the_file_says_is_put_around_a_text(byte_level_file: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(byte_level_file(pre="qwen2", add_bos_token=True, add_eos_token=True))
    bare = tokenizer.encode("hi there", add_special_tokens=False)
    assert tokenizer.encode("hi there") == [1, *bare, 2]
    assert tokenizer.encode("héé", add_special_tokens=True)[0] == 1


def test_end_of_turn_tokens_end_a_text_though_the_file_names_only_the_end_of_text(
    byte_level_file: Callable[..., Path],
) -> None:
    assert load_tokenizer(byte_level_file(pre="qwen2", eos_token_id=0)).eos_ids == {0, 2}  # 2 is <|im_end|>
    assert load_tokenizer(byte_level_file(pre="qwen2", eos_token_id=0, eot_token_id=1)).eos_ids == {0, 1}


def test_a_user_defined_token_is_matched_whole_and_is_no_control_token(byte_level_file: Callable[..., Path]) -> None:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(ord("!"), 0x7F)), "!!", "<think>"]
    kinds = [3, 3, 3, *[1] * (len(tokens) - 4), 4]
    tokenizer = load_tokenizer(byte_level_file(pre="gpt-2", tokens=tokens, token_type=kinds, merges=["! !"]))
    assert len(tokens) - 1 in tokenizer.encode("a<think>b")
    assert tokenizer.decode(tokenizer.encode("a<think>b")) == "a<think>b"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"pre": "smolm"}, "smolm.*not known.*'smollm'"),
        ({"pre": "something-new"}, "something-new.*not known"),
        ({"pre": "gpt-2", "model": "rwkv"}, "'rwkv' are not supported"),
        ({"pre": "gpt-2", "model": "no_vocab"}, "'no_vocab' are not supported"),
        ({"pre": "gpt-2", "merges": ["nospace"]}, "corrupt merges: 'nospace'"),
        ({"pre": "gpt-2", "merges": ["zz yy"]}, "corrupt merges"),
        ({"pre": "gpt-2", "tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, "token 'a' is in its vocabulary twice"),
        ({"pre": "gpt-2", "token_type": [1, 1]}, "603 tokens but 2 token types|600 tokens but 2 token types"),
        ({"pre": "gpt-2", "bos_token_id": 9999}, "bos_token_id is 9999, past the"),
        ({"pre": "gpt-2", "bos_token_id": "one"}, "bos_token_id is a str, not a int"),
        ({"pre": "gpt-2", "bos_token_id": -1, "add_bos_token": True}, "adds a bos token to every text, but has no bos"),
        ({"pre": "gpt-2", "tokens": []}, "its vocabulary is empty"),
    ],
)
def test_a_bad_vocabulary_is_refused_with_one_line(
    keys: dict[str, object], said: str, byte_level_file: Callable[..., Path]
) -> None:
    path = byte_level_file(**keys)
    with pytest.raises(UserError, match=said) as refusal:
        load_tokenizer(path)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)
