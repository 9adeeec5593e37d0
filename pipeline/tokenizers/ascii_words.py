"""A short cut for byte-level BPE: ASCII text is cut into words by `re`, and a word met before is looked up.

The library spends most of its time on offsets and its regular expressions, not on merging. English text repeats its
words so much that looking them up is five times as fast. What the library would do with each word is asked from the
library, once; a test holds the two against each other for every pre-tokenizer.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer as LibraryBackend
from tokenizers import models

from pipeline.tokenizers.pre_tokenizers import GPT2_PATTERN
from pipeline.tokenizers.streaming import BYTE_OF_CHARACTER

_ASCII = [chr(code) for code in range(128)]
_WHITE_SPACE = "\t\n\x0b\x0c\r "
_SHORTHANDS = {"s": _WHITE_SPACE, "d": "0123456789"}
_PLAIN_NORMALIZERS = frozenset({"NFC", "NFD", "NFKC", "NFKD"})  # they leave ASCII as it is
_SPELLING = str.maketrans({chr(byte): character for character, byte in BYTE_OF_CHARACTER.items() if byte < 128})
# Text on which a wrong translation shows: every character, and white space of each kind beside each kind of character.
_PROBE = "".join(_ASCII) + "".join(f"{space}{sign}  {space}1{sign}\n" for space in _WHITE_SPACE for sign in "a'S $\r")
_MAX_WORD = 64  # characters of a word worth remembering
_MAX_WORDS = 1 << 18


class AsciiWords:
    """`encode(text)` for ASCII text without added tokens: the ids that the library gives, without special ones."""

    def __init__(self, model: models.BPE, patterns: Sequence[str]) -> None:
        """`patterns` are applied in turn, as `Split(..., "isolated")` does. Each captures its whole match."""
        self._model = model
        self._first, *self._rest = (re.compile(f"({pattern})") for pattern in patterns)
        self._ids_of: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        words: Iterable[str] = self._first.split(text)
        for pattern in self._rest:
            words = [word for longer in words if longer for word in pattern.split(longer)]
        ids: list[int] = []
        ids_of = self._ids_of
        for word in words:
            if word:
                found = ids_of.get(word)
                ids += self._ask(word) if found is None else found
        return ids

    def _ask(self, word: str) -> list[int]:
        ids = [token.id for token in self._model.tokenize(word.translate(_SPELLING))]
        if len(word) <= _MAX_WORD:
            if len(self._ids_of) >= _MAX_WORDS:
                self._ids_of.clear()
            self._ids_of[word] = ids
        return ids


def ascii_words(backend: LibraryBackend) -> AsciiWords | None:
    """Return the short cut for `backend`, or None where it can't be sure to give the same."""
    model = backend.model
    if not isinstance(model, models.BPE) or model.dropout or model.continuing_subword_prefix:
        return None
    if model.end_of_word_suffix or not _is_plain(backend.normalizer):
        return None
    steps = _flatten(_settings(backend.pre_tokenizer), "pretokenizers")
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space", True):
        return None
    patterns = [_step_pattern(step) for step in steps[:-1]]
    if steps[-1].get("use_regex", True):
        patterns.append(ascii_pattern(GPT2_PATTERN))
    known = [pattern for pattern in patterns if pattern is not None]
    if not known or len(known) < len(patterns):
        return None
    words = AsciiWords(model, known)
    bare = LibraryBackend(model)
    bare.pre_tokenizer = backend.pre_tokenizer
    return words if words.encode(_PROBE) == bare.encode(_PROBE).ids else None


def ascii_pattern(pattern: str) -> str | None:
    """Return what Oniguruma's `pattern` means for ASCII text, for Python's `re`; None where that is not certain.

    `r"\\p{N}{1,3}|\\s+(?!\\S)"` becomes a pattern with each class spelled out.
    """
    translated, at, in_class = "", 0, False
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            found = re.compile(r"\\(?:([pP])\{(\w+)\}|(.))", re.DOTALL).match(pattern, at)
            if found is None:
                return None
            members = _members(found[1], found[2], found[3])
            if members is None:
                return None
            translated += members if in_class else f"[{members}]" if members else "(?!)"
            at = found.end()
            continue
        if in_class:
            if character == "[" or pattern.startswith("&&", at):
                return None
            in_class = character != "]"
        elif character == "[":
            in_class = True
            if pattern.startswith("^", at + 1):
                translated, at, character = translated + "[", at + 1, "^"
        elif character in ".^":
            return None
        elif character == "$":
            character = r"(?=\n|\Z)"
        elif character == "(" and not pattern.startswith("?", at + 1):
            character = "(?:"
        translated += character
        at += 1
    try:
        compiled = re.compile(translated)
    except re.error:
        return None
    matches_nothing = any(found.end() == found.start() for found in compiled.finditer(_PROBE))
    return None if compiled.groups or matches_nothing else translated


def _members(negated: str | None, category: str | None, escaped: str | None) -> str | None:
    """Return the inside of a character class for an escape, None for one that is not known."""
    if category is not None:
        if not re.fullmatch(r"[LMNPSZC][a-z]?", category):
            return None
        inside = [character for character in _ASCII if unicodedata.category(character).startswith(category)]
        chosen = [character for character in _ASCII if (character in inside) != (negated == "P")]
    elif escaped is not None and escaped.lower() in _SHORTHANDS:
        inside = list(_SHORTHANDS[escaped.lower()])
        chosen = [character for character in _ASCII if (character in inside) != escaped.isupper()]
    elif escaped is not None and escaped in "rnt":
        chosen = [{"r": "\r", "n": "\n", "t": "\t"}[escaped]]
    elif escaped is not None and not escaped.isalnum():
        chosen = [escaped]
    else:
        return None
    return "".join(re.escape(character) for character in chosen)


def _step_pattern(step: dict[str, Any]) -> str | None:
    kind = step.get("type")
    if kind == "Digits":
        return "[0-9]" if step.get("individual_digits") else "[0-9]+"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        pattern = step["pattern"]
        return re.escape(pattern["String"]) if "String" in pattern else ascii_pattern(pattern["Regex"])
    return None


def _is_plain(normalizer: object) -> bool:
    return all(step.get("type") in _PLAIN_NORMALIZERS for step in _flatten(_settings(normalizer), "normalizers"))


def _settings(part: Any) -> dict[str, Any]:
    """Return a part of a library tokenizer as tokenizer.json writes it."""
    settings: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return settings


def _flatten(settings: dict[str, Any], key: str) -> list[dict[str, Any]]:
    if settings.get("type") == "Sequence":
        return [step for inner in settings[key] for step in _flatten(inner, key)]
    return [settings] if settings else []
