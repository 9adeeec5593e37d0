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
    """Text from `start` to `end` stands for the token `token_id`, a control token if `special`."""

    start: int
    end: int
    token_id: int
    special: bool


class AddedTokens:
    """A vocabulary's added tokens, and where they occur: leftmost first, the longest where several begin."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._by_text = {token.text: token for token in tokens if token.text}
        self._all = _pattern(self._by_text)
        self._special = _pattern(text for text, token in self._by_text.items() if token.special)
        self._has_ordinary = any(not token.special for token in self._by_text.values())
        self._longest = max(map(len, self._by_text), default=0)

    @property
    def control_strings(self) -> frozenset[str]:
        return frozenset(text for text, token in self._by_text.items() if token.special)

    def find(self, text: str, *, parse_special: bool, literal: Sequence[Span] = ()) -> list[Match]:
        """Return the added tokens in `text`, in order. Control tokens only if `parse_special` and outside `literal`.

        White space that belongs to a token is part of its match, even where it lies in a literal span. An ordinary
        token is not found where a control token's string overlaps it, parsed or not, as in the `tokenizers` library.
        """
        if self._all is None or not (parse_special or self._has_ordinary):
            return []
        everywhere = [(0, len(text))]
        if not parse_special:
            return [match for match in self._matches(text, everywhere) if not match.special]
        if not literal:
            return self._matches(text, everywhere)
        control = [match for match in self._matches(text, outside(literal, len(text))) if match.special]
        if not self._has_ordinary:
            return control
        plain = outside([(match.start, match.end) for match in control], len(text))
        ordinary = [match for match in self._matches(text, plain) if not match.special]
        return sorted([*control, *ordinary], key=lambda match: match.start)

    def occur_in(self, text: str) -> bool:
        """Whether the string of any added token lies in `text`."""
        return self._all is not None and self._all.search(text) is not None

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

    def _matches(self, text: str, spans: Sequence[Span]) -> list[Match]:
        """Return the tokens whose strings lie wholly in one of `spans`, in order."""
        assert self._all is not None
        matches: list[Match] = []
        taken = 0
        for start, end in spans:
            for found in self._all.finditer(text, start, end):
                token = self._by_text[found.group()]
                left, right = found.span()
                if token.single_word and _inside_word(text, left, right):
                    continue
                if token.strips_left:
                    left = len(text[:left].rstrip())
                if token.strips_right:
                    right = len(text) - len(text[right:].lstrip())
                matches.append(Match(max(left, taken), right, token.token_id, token.special))
                taken = right
        return matches


def outside(spans: Sequence[Span], length: int) -> list[Span]:
    """Return the ranges of a text of `length` that no span covers."""
    gaps, at = [], 0
    for start, end in spans:
        if start >= end:
            continue
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
