"""The tokenizer keys of GGUF files, which every kind of vocabulary shares.

The metadata keys and their defaults are described in ggml's docs/gguf.md; what they mean for text follows llama.cpp's
src/llama-vocab.cpp, which writes and reads them.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TypeVar, cast

from pipeline.errors import UserError
from pipeline.gguf_metadata import read_gguf_metadata
from pipeline.tokenizers.checkpoint import CheckpointFacts, digest_of

Value = TypeVar("Value")

# Files that name only the end of text are common, though a chat's turn ends otherwise. llama.cpp finds these by name.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>", "<|eom_id|>")


_LLAMA_IDS = {"unknown": 0, "bos": 1, "eos": 2}
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}


class TokenType(enum.IntEnum):
    """`tokenizer.ggml.token_type`: what a token is for."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Vocabulary:
    """The tokenizer keys of one GGUF file, with their types checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metadata = read_gguf_metadata(path, prefix=("tokenizer.", "general.architecture"))
        self.architecture = str(self._metadata.pop("general.architecture", ""))
        self.kind = self.value("model", str, "")
        if not self.kind:
            raise UserError(f"{path}: has no tokenizer (no tokenizer.ggml.model); convert it again with its vocabulary")
        self.tokens = [text or f"[EMPTY_{index}]" for index, text in enumerate(self.array("tokens", str))]
        if not self.tokens:
            raise UserError(f"{path}: its vocabulary is empty")
        self.types = self.array("token_type", int) or [TokenType.NORMAL] * len(self.tokens)
        self.id_of = {text: index for index, text in enumerate(self.tokens)}
        if len(self.types) != len(self.tokens):
            raise UserError(f"{path}: {len(self.tokens)} tokens but {len(self.types)} token types; convert it again")
        if len(self.id_of) != len(self.tokens):
            twice = next(text for index, text in enumerate(self.tokens) if self.id_of[text] != index)
            raise UserError(f"{path}: the token {twice!r} is in its vocabulary twice; convert it again")

    def value(self, key: str, kind: type[Value], default: Value) -> Value:
        """Return `tokenizer.ggml.KEY`, or `default` where the file does not have it."""
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return default
        if not isinstance(value, kind):
            raise UserError(f"{self.path}: tokenizer.ggml.{key} is a {type(value).__name__}, not a {kind.__name__}")
        return value

    def array(self, key: str, kind: type[Value]) -> list[Value]:
        """Return the array `tokenizer.ggml.KEY`, empty where the file does not have it."""
        values = self.value(key, list, [])
        if kind is float:  # some converters write whole scores as integers
            values = [float(value) if isinstance(value, int) else value for value in values]
        if values and not isinstance(values[0], kind):
            raise UserError(f"{self.path}: tokenizer.ggml.{key} holds {type(values[0]).__name__}, not {kind.__name__}")
        return cast(list[Value], values)

    def token_id(self, role: str) -> int | None:
        """Return the id that `tokenizer.ggml.ROLE_token_id` names; a SentencePiece vocabulary has three by default."""
        token_id = self.value(f"{role}_token_id", int, _LLAMA_IDS.get(role, -1) if self.kind == "llama" else -1)
        if token_id >= len(self.tokens):
            raise UserError(f"{self.path}: {role}_token_id is {token_id}, past the {len(self.tokens)} tokens it has")
        return token_id if token_id >= 0 else None

    def special_tokens(self) -> dict[str, str]:
        """Return role -> string: `{"bos_token": "<s>", ...}`. The file format itself misspells `seperator`."""
        ids = {f"{role}_token": self.token_id(key) for role, key in _ROLES.items()}
        return {role: self.tokens[token_id] for role, token_id in ids.items() if token_id is not None}

    def facts(self) -> CheckpointFacts:
        eos_ids = {self.token_id(role) for role in ("eos", "eot", "eom")}
        if self.token_id("eot") is None:
            eos_ids |= {
                self.id_of[text]
                for text in _TURN_ENDS
                if text in self.id_of and self.types[self.id_of[text]] == TokenType.CONTROL
            }
        template = self._metadata.get("tokenizer.chat_template")
        kept = {key: value for key, value in self._metadata.items() if not key.startswith("tokenizer.chat_template")}
        return CheckpointFacts(
            bos_id=self.token_id("bos"),
            eos_ids=frozenset(token_id for token_id in eos_ids if token_id is not None),
            chat_template=template if isinstance(template, str) else None,
            special_tokens=self.special_tokens(),
            digest=digest_of(kept),
        )

    def ends_added(self, *, adds_bos: bool) -> tuple[int | None, int | None]:
        """Return the tokens put before and after a text by default; `adds_bos` where the file does not say."""
        ends = []
        for role, default in (("bos", adds_bos), ("eos", False)):
            adds = self.value(f"add_{role}_token", bool, default)
            if adds and self.token_id(role) is None:
                raise UserError(f"{self.path}: adds a {role} token to every text, but has no {role}_token_id")
            ends.append(self.token_id(role) if adds else None)
        return ends[0], ends[1]
