"""The strings of control tokens in text: where they are, and how to keep a template from changing or joining them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import chain, count
from typing import Any

Span = tuple[int, int]

_PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))  # planes that no character is assigned in


class ControlStrings:
    """`<|im_end|>` and the like: what the tokenizer would read as one control token."""

    def __init__(self, strings: Collection[str]) -> None:
        longest_first = sorted(filter(None, strings), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def occur_in(self, text: str) -> bool:
        return self._pattern.search(text) is not None

    def hide(self, values: Mapping[str, Any], beside: str = "") -> tuple[dict[str, Any], dict[str, str]]:
        """The values with a private-use character for each control string in them, and what each stands for.

        No such character is in the values or in `beside`. Lists and dictionaries are gone through.
        """
        texts = list(_texts_in(values))
        found = {match.group() for text in texts for match in self._pattern.finditer(text)}
        if not found:
            return dict(values), {}
        taken = set(beside).union(*texts)
        free = (chr(code) for code in chain(*_PRIVATE_USE) if chr(code) not in taken)
        markers = {string: next(free) for string in sorted(found)}

        def hidden(value: Any) -> Any:
            if isinstance(value, str):
                return self._pattern.sub(lambda match: markers[match.group()], value)
            if isinstance(value, list):
                return [hidden(item) for item in value]
            if isinstance(value, dict):
                return {name: hidden(item) for name, item in value.items()}
            return value

        return hidden(dict(values)), {marker: string for string, marker in markers.items()}


def reveal(text: str, hidden: Mapping[str, str]) -> tuple[str, tuple[Span, ...]]:
    """Text with control strings again in place of what hides them, and where they are now."""
    if not hidden:
        return text, ()
    pieces: list[str] = []
    spans: list[Span] = []
    length = 0
    for index, piece in zip(count(), re.split(f"([{''.join(hidden)}])", text), strict=False):
        if index % 2:
            piece = hidden[piece]
            spans.append((length, length + len(piece)))
        pieces.append(piece)
        length += len(piece)
    return "".join(pieces), tuple(spans)


def _texts_in(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts_in(item)
    elif isinstance(value, dict):
        yield from _texts_in(list(value.values()))
