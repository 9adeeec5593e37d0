"""Finding the strings of control tokens in text, outside the spans that are to be read literally."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.tokenizer import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlToken:
    """A token with a meaning of its own: `<s>`, `<|im_start|>`.

    `strips_left` and `strips_right`: the white space on that side belongs to it. `single_word`: only counts between
    characters that belong to no word.
    """

    text: str
    token_id: int
    strips_left: bool = False
    strips_right: bool = False
    single_word: bool = False


@dataclass(frozen=True, slots=True)
class Match:
    """Text from `start` to `end` stands for the control token `token_id`."""

    start: int
    end: int
    token_id: int


class ControlTokens:
    """A vocabulary's control tokens, and where they occur: leftmost first, the longest where several begin."""

    def __init__(self, tokens: Iterable[ControlToken]) -> None:
        self._by_text = {token.text: token for token in tokens if token.text}
        self._longest = max(map(len, self._by_text), default=0)
        self._pattern = re.compile(trie_pattern(self._by_text) if self._by_text else r"(?!)", re.DOTALL)

    def __bool__(self) -> bool:
        return bool(self._by_text)

    def find(self, text: str, literal: Sequence[Span] = ()) -> list[Match]:
        """Return the control tokens in `text`, in order. None of them touches a `literal` span.

        White space that belongs to a token is part of its match, even where it lies in a literal span.
        """
        matches: list[Match] = []
        taken = 0
        for start, end in outside(literal, len(text)):
            for found in self._pattern.finditer(text, start, end):
                token = self._by_text[found.group()]
                if token.single_word and _inside_word(text, found.start(), found.end()):
                    continue
                left, right = found.span()
                if token.strips_left:
                    left = len(text[:left].rstrip())
                if token.strips_right:
                    right = len(text) - len(text[right:].lstrip())
                matches.append(Match(max(left, taken), right, token.token_id))
                taken = right
        return matches

    def occur_in(self, text: str, literal: Sequence[Span]) -> bool:
        """Whether some control token's string lies in `text` so that it touches a literal span."""
        reach = self._longest - 1
        for start, end in literal:
            at = max(0, start - reach)
            while start < end and (found := self._pattern.search(text, at, min(len(text), end + reach))):
                if found.start() >= end:
                    break
                if found.end() > start:
                    return True
                at = found.start() + 1
        return False


def trie_pattern(words: Iterable[str]) -> str:
    """Return a regular expression that matches the longest of `words`, sharing their beginnings.

    Some vocabularies have thousands (`<unused0>`, `<unused1>`, ...); a plain alternation would try one after another.
    `["<a>", "<ab>"]` gives `<a(?:>|b>)`.
    """
    trie: dict[str, dict] = {}  # type: ignore[type-arg]  # nested without end
    for word in words:
        node = trie
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}

    def pattern(node: dict[str, dict]) -> str:  # type: ignore[type-arg]
        branches = [re.escape(character) + pattern(below) for character, below in node.items() if character]
        if not branches:
            return ""
        if "" in node:
            return f"(?:{'|'.join(branches)})?"
        return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"

    return pattern(trie)


def outside(spans: Sequence[Span], length: int) -> list[Span]:
    """Return the ranges of a text of `length` that no span covers."""
    gaps, at = [], 0
    for start, end in spans:
        if start > at:
            gaps.append((at, start))
        at = max(at, end)
    return [*gaps, (at, length)] if at < length else gaps


def _inside_word(text: str, start: int, end: int) -> bool:
    before, after = text[start - 1 : start], text[end : end + 1]
    return before.isalnum() or before == "_" or after.isalnum() or after == "_"
