"""Text to token ids and back: what every tokenizer does, and which kind a checkpoint has.

A row's text never becomes a control token by itself: `encode` takes `<|im_end|>` in it for eight characters. The text
that a chat template renders is parsed (`parse_special`), except for its `literal` spans, which came from the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from pipeline.errors import RowError, UserError

Span = tuple[int, int]


class PromptText(Protocol):
    """What a tokenizer needs of a prompt; `pipeline.prompts.Prompt` is one."""

    @property
    def text(self) -> str: ...

    @property
    def add_special_tokens(self) -> bool:
        """Whether the beginning-of-text token and the like are added, where the checkpoint's tokenizer adds them."""

    @property
    def parse_special(self) -> bool:
        """Whether the strings of control tokens in `text` become control tokens, `literal` spans excepted."""

    @property
    def literal(self) -> Sequence[Span]:
        """Half-open character ranges of `text`, in order and disjoint, that are never parsed."""


class IncrementalDecoder(Protocol):
    """Decodes one sequence as it grows. The pushed texts and the flushed one, joined, are `decode` of all its ids."""

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is settled now: whole characters only, often none."""

    def flush(self) -> str:
        """Return the text held back. The sequence ends here."""


class Tokenizer(Protocol):
    """A checkpoint's tokenizer. Safe to use from several threads at once; the batch call releases the GIL."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id. A model's embedding matrix may have more rows than this."""

    @property
    def bos_id(self) -> int | None:
        """The beginning-of-text token, if the vocabulary has one, whether or not `encode` adds it."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a text, by generation_config.json, config.json and the tokenizer's own files."""

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the checkpoint's (default) chat template."""

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Role -> string, `{"bos_token": "<s>", ...}`: the variables that chat templates expect."""

    @property
    def control_strings(self) -> frozenset[str]:
        """The strings of control tokens: what text from a row never becomes, but a parsed template does."""

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all that determines ids. The chat template is not part of it."""

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False, literal: Sequence[Span] = ()
    ) -> list[int]:
        """Return the ids of `text`. ValueError when it is not text (a lone surrogate)."""

    def encode_batch(self, prompts: Sequence[PromptText]) -> list[list[int] | RowError]:
        """Return each prompt's ids, or `not_text` for the ones that are none. One call into native code."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`. Ids that the vocabulary lacks stand for nothing."""

    def incremental(self, *, skip_special_tokens: bool = True) -> IncrementalDecoder: ...


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of the checkpoint at `path`: a .gguf file, or a directory in Hugging Face layout.

    In a directory `tokenizer.json` is preferred to `tokenizer.model`, as transformers does. UserError when there is
    none, when it is corrupt, or when it is of a kind that can't be followed exactly.
    """
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            from pipeline.tokenizers.hugging_face import load_hugging_face

            return load_hugging_face(path)
        if (path / "tokenizer.model").is_file():
            from pipeline.tokenizers.sentence_piece_files import load_sentence_piece

            return load_sentence_piece(path)
        others = [name for name in ("vocab.json", "merges.txt", "tekken.json", "vocab.txt") if (path / name).is_file()]
        instead = f" (only {' and '.join(others)}; save it again with a current transformers)" if others else ""
        raise UserError(f"{path}: no tokenizer.json or tokenizer.model in it{instead}")
    if path.suffix == ".gguf":
        return _load_gguf(path)
    raise UserError(f"{path}: no tokenizer there: neither a directory nor a .gguf file")


def _load_gguf(path: Path) -> Tokenizer:
    from pipeline.tokenizers.gguf_vocabulary import Vocabulary

    vocabulary = Vocabulary(path)
    if vocabulary.kind == "gpt2":
        from pipeline.tokenizers.gguf_byte_level import byte_level_tokenizer

        return byte_level_tokenizer(vocabulary)
    if vocabulary.kind == "llama":
        from pipeline.tokenizers.gguf_sentence_piece import sentence_piece_tokenizer

        return sentence_piece_tokenizer(vocabulary)
    raise UserError(f"{path}: vocabularies of the kind {vocabulary.kind!r} are not supported (gpt2 and llama are)")
