"""Decoding as tokens arrive, after the decoders of the `tokenizers` library.

A library decoder is a sequence of steps over the list of all tokens. Each step here does the same to a list that is
not complete yet: it passes on what later tokens can't change and keeps the rest. So the texts that come out, joined,
are what the library gives for the whole list, and never hold half a character.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

Settings = dict[str, Any]  # a decoder as tokenizer.json writes it


class UnknownDecoder(ValueError):
    """A decoder that can't be followed token by token; the message says which."""


class Step(Protocol):
    """One decoder, fed in pieces."""

    def feed(self, tokens: list[str]) -> list[str]: ...

    def finish(self) -> list[str]: ...


class StepwiseDecoder:
    """An IncrementalDecoder made of steps. `text_of` gives a token's string, or None for one that leaves no trace."""

    def __init__(self, text_of: Callable[[int], str | None], steps: Sequence[Step]) -> None:
        self._text_of = text_of
        self._steps = steps

    def push(self, token_id: int) -> str:
        text = self._text_of(token_id)
        if text is None:
            return ""
        tokens = [text]
        for step in self._steps:
            tokens = step.feed(tokens)
        return "".join(tokens)

    def flush(self) -> str:
        tokens: list[str] = []
        for step in self._steps:
            tokens = step.feed(tokens) + step.finish()
        return "".join(tokens)


def check_decoder(decoder: Settings | None) -> None:
    """Raise UnknownDecoder now rather than when the first text is decoded."""
    decoder_steps(decoder)


def decoder_steps(decoder: Settings | None) -> list[Step]:
    """Return fresh steps for one sequence, for a decoder as tokenizer.json describes it."""
    if decoder is None:
        return [_JoinWithSpaces()]
    return list(_steps(decoder, fused=[False]))


def _steps(decoder: Settings, fused: list[bool]) -> Iterable[Step]:
    """Yield the steps of `decoder`; `fused[0]` says whether the step before has joined all tokens into one."""
    kind = decoder.get("type")
    if kind == "Sequence":
        for inner in decoder["decoders"]:
            yield from _steps(inner, fused)
    elif kind == "ByteLevel":
        yield _ByteLevel()
        fused[0] = True
    elif kind == "Fuse":
        fused[0] = True
    elif kind == "ByteFallback" and not fused[0]:
        yield _ByteFallback()
    elif kind == "Replace" and not fused[0] and "String" in decoder["pattern"]:
        yield _Replace(decoder["pattern"]["String"], decoder["content"])
    elif kind == "Metaspace" and not fused[0]:
        yield _Metaspace(decoder["replacement"], strips=decoder.get("prepend_scheme", "always") != "never")
    elif kind == "Strip" and decoder["stop"] == 0:
        yield _StripStart(decoder["content"], decoder["start"], fused=fused[0])
    else:
        raise UnknownDecoder(f"its decoder has a {kind} step that can't be followed token by token")


class _Stateless:
    def finish(self) -> list[str]:
        return []


class _JoinWithSpaces(_Stateless):
    """No decoder at all: the library joins tokens with spaces."""

    def __init__(self) -> None:
        self._begun = False

    def feed(self, tokens: list[str]) -> list[str]:
        spaced = [f" {token}" if self._begun or at else token for at, token in enumerate(tokens)]
        self._begun = self._begun or bool(tokens)
        return spaced


class _Replace(_Stateless):
    def __init__(self, pattern: str, content: str) -> None:
        self._pattern = pattern
        self._content = content

    def feed(self, tokens: list[str]) -> list[str]:
        return [token.replace(self._pattern, self._content) for token in tokens]


class _Metaspace(_Stateless):
    """The sign for a space becomes one, but vanishes from the first token, where the encoder put it."""

    def __init__(self, replacement: str, *, strips: bool) -> None:
        self._replacement = replacement
        self._at_start = strips

    def feed(self, tokens: list[str]) -> list[str]:
        texts = []
        for token in tokens:
            texts.append(token.replace(self._replacement, "" if self._at_start else " "))
            self._at_start = False
        return texts


class _StripStart(_Stateless):
    """At most `count` times `content` vanishes from the beginning: of the whole text if `fused`, else of each token."""

    def __init__(self, content: str, count: int, *, fused: bool) -> None:
        self._content = content
        self._count = count
        self._fused = fused

    def feed(self, tokens: list[str]) -> list[str]:
        if self._fused and self._count == 0:
            return tokens
        return [self._strip(token) for token in tokens]

    def _strip(self, token: str) -> str:
        cut = 0
        while cut < min(self._count, len(token)) and token[cut] == self._content:
            cut += 1
        if self._fused:
            self._count = self._count - cut if cut == len(token) else 0
        return token[cut:]


class _ByteFallback:
    """A run of `<0xE4>` tokens becomes the text of its bytes, or, if they are not UTF-8, a replacement sign for each.

    One bad byte spoils its whole run, so a run is kept until it ends.
    """

    _TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

    def __init__(self) -> None:
        self._run = bytearray()

    def feed(self, tokens: list[str]) -> list[str]:
        texts = []
        for token in tokens:
            byte = self._TOKEN.fullmatch(token)
            if byte is not None:
                self._run.append(int(byte[1], 16))
            else:
                texts += [*self.finish(), token]
        return texts

    def finish(self) -> list[str]:
        run, self._run = bytes(self._run), bytearray()
        if not run:
            return []
        try:
            return [run.decode("utf-8")]
        except UnicodeDecodeError:
            return ["\N{REPLACEMENT CHARACTER}" * len(run)]


class _ByteLevel:
    """Every character of a token stands for a byte (GPT-2's alphabet); bytes that are not UTF-8 are replaced."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: list[str]) -> list[str]:
        return [self._decoder.decode(b"".join(map(token_bytes, tokens)))]

    def finish(self) -> list[str]:
        return [self._decoder.decode(b"", final=True)]


def _byte_alphabet() -> dict[int, int]:
    """Return byte -> code point of GPT-2's alphabet: printable Latin-1 stands for itself, the rest follows U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {byte: 0x100 + rank for rank, byte in enumerate(hidden)}


BYTE_OF_CHARACTER = {chr(character): byte for byte, character in _byte_alphabet().items()}


def token_bytes(token: str) -> bytes:
    """Return the bytes that a byte-level token stands for; one with foreign characters stands for its own UTF-8."""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode("utf-8")
