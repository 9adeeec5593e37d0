"""GGUF vocabularies of the kind `gpt2`: byte-level BPE."""

from __future__ import annotations

import difflib
from pathlib import Path

from tokenizers import AddedToken, decoders, models, processors
from tokenizers import Tokenizer as LibraryBackend

from pipeline.errors import UserError
from pipeline.tokenizers.gguf_vocabulary import TokenType, Vocabulary
from pipeline.tokenizers.library import LibraryTokenizer
from pipeline.tokenizers.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer


def byte_level_tokenizer(vocabulary: Vocabulary) -> LibraryTokenizer:
    return LibraryTokenizer(byte_level_backend(vocabulary), vocabulary.facts())


def byte_level_backend(vocabulary: Vocabulary) -> LibraryBackend:
    """Return the vocabulary as the `tokenizers` library has it, which can be saved as a tokenizer.json."""
    pre_tokenizer = _pre_tokenizer(vocabulary)
    merges = [_pair(merge, vocabulary.path) for merge in vocabulary.array("merges", str)]
    try:
        model = models.BPE(vocab=vocabulary.id_of, merges=merges, ignore_merges=pre_tokenizer.whole_words)
    except Exception as error:  # the library raises bare Exception for merges of unknown tokens
        raise UserError(f"{vocabulary.path}: corrupt merges: {error}") from None
    backend = LibraryBackend(model)
    backend.pre_tokenizer = pre_tokenizer.build()
    backend.decoder = decoders.ByteLevel()
    special_tokens = vocabulary.special_tokens()
    named = {special_tokens.get(role) for role in ("bos_token", "eos_token", "unk_token", "pad_token")}
    special_types = (TokenType.CONTROL, TokenType.UNKNOWN)
    backend.add_tokens(
        [
            AddedToken(text, normalized=False, special=kind in special_types or text in named)
            for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if kind in special_types or kind == TokenType.USER_DEFINED or text in named
        ]
    )
    backend.post_processor = _frame(vocabulary, *vocabulary.ends_added(adds_bos=pre_tokenizer.adds_bos))
    return backend


def _pre_tokenizer(vocabulary: Vocabulary) -> PreTokenizer:
    name = vocabulary.value("pre", str, "default")
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    near = difflib.get_close_matches(name, PRE_TOKENIZERS, n=1)
    hint = f" (the nearest known is {near[0]!r})" if near else ""
    raise UserError(
        f"{vocabulary.path}: its way of cutting words, tokenizer.ggml.pre {name!r}, is not known{hint}, and guessing"
        " would give wrong ids; use the model's Hugging Face directory instead"
    )


def _pair(merge: str, path: Path) -> tuple[str, str]:
    at = merge.find(" ", 1)
    if at < 0:
        raise UserError(f"{path}: corrupt merges: {merge!r} is not two tokens")
    return merge[:at], merge[at + 1 :]


def _frame(vocabulary: Vocabulary, before: int | None, after: int | None) -> processors.PostProcessor:
    tokens = vocabulary.tokens
    ends = [(tokens[token_id], token_id) for token_id in (before, after) if token_id is not None]
    single = [] if before is None else [tokens[before]]
    single.append("$A")
    single += [] if after is None else [tokens[after]]
    return processors.TemplateProcessing(single=single, pair=[*single, "$B:1"], special_tokens=ends)
