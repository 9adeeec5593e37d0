"""Finding the strings of added tokens in text: control tokens only where they may stand, the others everywhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.tokenizer import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """A token that is matched whole before text is cut into words.

    `special`: a control token (`<s>`, `<|im_start|>`), which text from a row never becomes. `strips_left` and
    `strips_right`: the white space on that side belongs to it. `single_word`: only counts where no word goes on.
    """

    text: str
    token_id: int
    special: bool
    strips_left: bool = False
    strips_right: bool = False
    single_word: bool = False


@dataclass(frozen=True, slots=True)
class Match:
    """Text from `start` to `end` stands for the token `token_id`."""

    start: int
    end: int
    token_id: int


class AddedTokens:
    """A vocabulary's added tokens, and where they occur: leftmost first, the longest where several begin."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._by_text = {token.text: token for token in tokens if token.text}
        self._all = _pattern(self._by_text)
        self._special = _pattern(text for text, token in self._by_text.items() if token.special)
        self._ordinary = _pattern(text for text, token in self._by_text.items() if not token.special)
        self._longest = max(map(len, self._by_text), default=0)

    @property
    def control_strings(self) -> frozenset[str]:
        return frozenset(text for text, token in self._by_text.items() if token.special)

    def find(self, text: str, *, parse_special: bool, literal: Sequence[Span] = ()) -> list[Match]:
        """Return the added tokens in `text`, in order. Control tokens only if `parse_special` and outside `literal`.

        White space that belongs to a token is part of its match, even where it lies in a literal span.
        """
        if not parse_special:
            return self._matches(self._ordinary, text, [(0, len(text))]) if self._ordinary is not None else []
        if self._all is None:
            return []
        if not literal:
            return self._matches(self._all, text, [(0, len(text))])
        free = outside(literal, len(text))
        matches = self._matches(self._all, text, free)
        if self._ordinary is not None:
            matches += self._matches(self._ordinary, text, outside(free, len(text)))
            matches.sort(key=lambda match: match.start)
        return matches

    def control_touches(self, text: str, literal: Sequence[Span]) -> bool:
        """Whether the string of some control token lies in `text` so that it touches a literal span."""
        if self._special is None:
            return False
        reach = self._longest - 1
        for start, end in literal:
            at = max(0, start - reach)
            while start < end and (found := self._special.search(text, at, min(len(text), end + reach))):
                if found.start() >= end:
                    break
                if found.end() > start:
                    return True
                at = found.start() + 1
        return False

    def _matches(self, pattern: re.Pattern[str], text: str, spans: Sequence[Span]) -> list[Match]:
        """Return the matches of `pattern` that lie wholly in one of `spans`."""
        matches: list[Match] = []
        taken = 0
        for start, end in spans:
            for found in pattern.finditer(text, start, end):
                token = self._by_text[found.group()]
                left, right = found.span()
                if token.single_word and _inside_word(text, left, right):
                    continue
                if token.strips_left:
                    left = len(text[:left].rstrip())
                if token.strips_right:
                    right = len(text) - len(text[right:].lstrip())
                matches.append(Match(max(left, taken), right, token.token_id))
                taken = right
        return matches


def outside(spans: Sequence[Span], length: int) -> list[Span]:
    """Return the ranges of a text of `length` that no span covers."""
    gaps, at = [], 0
    for start, end in spans:
        if start > at:
            gaps.append((at, start))
        at = max(at, end)
    return [*gaps, (at, length)] if at < length else gaps


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


def _pattern(words: Iterable[str]) -> re.Pattern[str] | None:
    words = list(words)
    return re.compile(trie_pattern(words)) if words else None


def _inside_word(text: str, start: int, end: int) -> bool:
    before, after = text[start - 1 : start], text[end : end + 1]
    return before.isalnum() or before == "_" or after.isalnum() or after == "_"
