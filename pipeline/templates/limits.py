"""How much a template may do, and how large the results of single operations would be.

Jinja's sandbox stops escapes, not `"x" * 10**9` or three nested loops over a million numbers. So every loop turn, call,
filter and operator is counted, and what could make something large is refused before it is made. Single operations then
take bounded time, and the clock needs to be read only between them.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

MAX_INTEGER_BITS = 20_000

_MAX_WORK = 8  # times max_chars: all that a rendering makes, intermediate results included
_MAX_FORMAT_WIDTH = 10_000
_NUMBERS = re.compile(r"[0-9]+")


Question = tuple[str, tuple[object, ...], bool]  # a method of str, its arguments, what it answers


class OverLimit(Exception):
    """The template does more than it may; the message is the end of a sentence about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateLimits:
    """`max_chars` of one result; `max_items` of one list; `max_steps` loop turns, calls and operators of a rendering.

    Steps end nearly everything before `max_seconds` of processor time do, so that a row's fate does not hang on how
    busy the machine is.
    """

    max_chars: int = 16_000_000
    max_items: int = 250_000
    max_steps: int = 1_000_000
    max_seconds: float = 10.0


class Meter(threading.local):
    """What the rendering that goes on in this thread has used up."""

    def __init__(self, limits: TemplateLimits) -> None:
        self.limits = limits
        self.begin()

        self.watched: str | None = None  # text whose uses are to be noticed; see pipeline.templates.chat_frame
        self.was_used = False  # something may have depended on what the watched text is
        self.was_trimmed = False
        self.questions: list[Question] = []

    def begin(self) -> None:
        self._steps = 0
        self._work = 0
        self._deadline = time.thread_time() + self.limits.max_seconds

    def step(self, chars: int = 0) -> None:
        """Count a step that makes `chars` characters."""
        self._steps += 1
        if self._steps > self.limits.max_steps:
            raise OverLimit(f"takes more than {self.limits.max_steps:,} steps")
        self._work += chars
        if self._work > self.limits.max_chars * _MAX_WORK:
            raise OverLimit(f"makes more than {self.limits.max_chars * _MAX_WORK:,} characters on the way")
        if time.thread_time() > self._deadline:
            raise OverLimit(f"takes more than {self.limits.max_seconds:g} seconds")

    def made(self, value: object) -> None:
        """Count a step that made `value`."""
        self.step(len(value) if isinstance(value, str | bytes | list | tuple) else 0)

    def allow(self, chars: int) -> None:
        """OverLimit if a result of so many characters is too long."""
        if chars > self.limits.max_chars:
            raise OverLimit(f"makes more than {self.limits.max_chars:,} characters at once")

    def allow_items(self, items: int) -> None:
        if items > self.limits.max_items:
            raise OverLimit(f"makes or looks at more than {self.limits.max_items:,} items at once")

    def listed(self, values: Iterable[object]) -> list[object]:
        """The values as a list, if they are not too many."""
        items = list(islice(values, self.limits.max_items + 1))
        self.allow_items(len(items))
        return items

    def allow_text(self, *values: object, times: int = 1, extra: int = 0, indent: int = 0) -> None:
        """OverLimit if the values, printed `times` times, are too long; `extra` and `indent` (by depth) for each item.

        A list may hold another one many times, so that what it prints is far larger than what it takes; and comparing
        or hashing it takes as long as printing it.
        """
        left = self.limits.max_chars // max(1, times)
        items = 0
        waiting: list[tuple[object, int]] = [(value, 0) for value in values]
        while waiting:
            value, depth = waiting.pop()
            left -= extra + indent * depth
            items += 1
            if isinstance(value, str | bytes):
                left -= len(value)
            elif isinstance(value, dict):
                waiting += [(item, depth + 1) for pair in value.items() for item in pair]
                left -= 4 * len(value)
            elif isinstance(value, list | tuple | set | frozenset):
                waiting += [(item, depth + 1) for item in value]
                left -= 2 * len(value)
            elif isinstance(value, int):
                left -= 1 + value.bit_length() // 3
            else:
                left -= 8
            if left < 0:
                self.allow(self.limits.max_chars + 1)
            self.allow_items(items)

    def allow_format(self, pattern: str | bytes) -> None:
        """OverLimit for a format, %-style or in braces, that asks for a great width or takes it from its arguments."""
        text = pattern if isinstance(pattern, str) else pattern.decode("latin-1")
        wide = any(int(number) > _MAX_FORMAT_WIDTH for number in _NUMBERS.findall(text) if len(number) > 4)
        if wide or re.search(r"%[^a-zA-Z%]*\*|:[^{}]*\{", text):
            raise OverLimit("formats wider than it may")

    def allow_operator(self, operator: str, left: object, right: object) -> None:
        """OverLimit if `left operator right` is too large."""
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(other, int):
                    if isinstance(one, str | bytes):
                        self.allow(len(one) * other)
                    elif isinstance(one, list | tuple):
                        self.allow_items(len(one) * other)
            if isinstance(left, int) and isinstance(right, int):
                self._allow_bits(left.bit_length() + right.bit_length())
        elif operator == "+":
            if isinstance(left, str | bytes) and isinstance(right, str | bytes):
                self.allow(len(left) + len(right))
            elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
                self.allow_items(len(left) + len(right))
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and right > 0:
                self._allow_bits(left.bit_length() * right)
        elif operator == "%" and isinstance(left, str | bytes):
            self.allow_format(left)
            self.allow_text(left, right, times=left.count("%") if isinstance(left, str) else left.count(b"%"))

    def ask(self, text: object, method: str, arguments: tuple[object, ...], answer: object) -> None:
        """Notice a question to a text that is answered with yes or no."""
        if self.watched is not None:
            if text == self.watched and isinstance(answer, bool) and all(isinstance(each, str) for each in arguments):
                self.questions.append((method, arguments, answer))
            else:
                self.look(text, arguments)

    def look(self, *values: object) -> None:
        """Notice a use of these values that may depend on the watched text."""
        if self.watched is not None and not self.was_used:
            self.was_used = any(self.watched in text for text in _texts_in(values))

    def _allow_bits(self, bits: int) -> None:
        if bits > MAX_INTEGER_BITS:
            raise OverLimit(f"makes a number of more than {MAX_INTEGER_BITS:,} bits")


def _texts_in(values: Iterable[object]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _texts_in(value)
            yield from _texts_in(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            yield from _texts_in(value)
