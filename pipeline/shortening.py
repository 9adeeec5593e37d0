"""How much of a text can stay for it to keep within a number of tokens."""

from __future__ import annotations

from collections.abc import Callable


def longest_fitting(length: int, num_tokens: int, limit: int, count: Callable[[int], int]) -> int:
    """The largest n < length with `count(n) <= limit`, where `count(n)` are the tokens with n characters kept, else 0.

    All `length` characters take `num_tokens`, which is more than the limit. Counts are taken to grow with n; where they
    don't quite, n still fits, though a larger one might too. About ten counts for a million characters: tokens are
    spread evenly enough for a straight line between two counts to come near.
    """
    low, low_tokens = 0, 0
    high, high_tokens = length, num_tokens
    bisect = False
    while high - low > 1:
        if bisect or high_tokens <= low_tokens:
            middle = (low + high) // 2
        else:
            middle = low + (high - low) * (limit - low_tokens) // (high_tokens - low_tokens)
        middle = min(max(middle, low + 1), high - 1)
        width = high - low
        tokens = count(middle)
        if tokens <= limit:
            low, low_tokens = middle, tokens
        else:
            high, high_tokens = middle, tokens
        bisect = (high - low) * 2 > width  # a line that does not even halve the range is no help
    return low
