"""Which keys a query sees, as data. Pure: the cache's block tables read it as well as attention does.

The factorised patterns are those of the Sparse Transformer (Child et al. 2019, section 4): two parts, each of about
sqrt(n) of a query's n keys, so that every position reaches every earlier one in two steps. A head attends to both
(merged), or the heads take them in turn (divided), or a layer has only the first or the second (alternating by layer).

i is a query's position, j a key's; all patterns are causal, j <= i.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import gcd
from typing import Literal

Form = Literal["merged", "divided", "first", "second"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What one query head sees: a run of keys that ends at the query itself, and some of those before the run.

    The run (`near`) is everything, the last `width` positions, those of the query's own block of `width` positions, or
    nothing. Of the keys before it (`far`) a head sees none, those a multiple of `period` away (a column, if positions
    are written in rows of `period`), or in each block of `period` those at the offsets summary[0] to summary[1] - 1. A
    query that would see nothing, as those before the first summary do without a run, sees itself.
    """

    near: Literal["all", "window", "block", "none"] = "all"
    width: int = 0
    far: Literal["none", "column", "summary"] = "none"
    period: int = 0
    summary: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strided:
    """First part: the query and the `stride` positions before it. Second: every j with (i - j) mod stride = 0.

    Example: with stride 4 a query at 13 sees 9 to 13 in its first part and 1, 5, 9, 13 in its second.
    """

    stride: int
    form: Form = "merged"

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"a stride of {self.stride}; it must be at least 1")

    def reaches(self, num_heads: int) -> tuple[Reach, ...]:
        """What each query head sees."""
        first = Reach(near="window", width=self.stride + 1)
        second = Reach(near="none", far="column", period=self.stride)
        both = Reach(near="window", width=self.stride + 1, far="column", period=self.stride)
        return _by_form(self.form, num_heads, [first], [second], [both])


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """First part: the keys of the query's own block of `block` positions. Second: the last `summary` of every block.

    With `distinct`, heads that attend to summaries take subblocks of that length in turn, from the block's end on,
    rather than all the same one (the paper's finding for several heads).

    Example: with blocks of 4 and summaries of 1 a query at 13 sees 12 and 13 in its first part and 3, 7, 11 in its
    second.
    """

    block: int
    summary: int
    form: Form = "merged"
    distinct: bool = False

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"blocks of {self.block} positions; it must be at least 1")
        if not 1 <= self.summary <= self.block:
            raise ValueError(f"a summary of {self.summary} of a block's {self.block} positions; it must be 1 to all")

    def reaches(self, num_heads: int) -> tuple[Reach, ...]:
        """What each query head sees."""
        first = Reach(near="block", width=self.block)
        spans = self._spans()
        second = [Reach(near="none", far="summary", period=self.block, summary=span) for span in spans]
        both = [Reach(near="block", width=self.block, far="summary", period=self.block, summary=span) for span in spans]
        return _by_form(self.form, num_heads, [first], second, both)

    def _spans(self) -> list[tuple[int, int]]:
        count = self.block // self.summary if self.distinct else 1
        return [(self.block - (n + 1) * self.summary, self.block - n * self.summary) for n in range(count)]


def _by_form(
    form: Form, num_heads: int, first: list[Reach], second: list[Reach], both: list[Reach]
) -> tuple[Reach, ...]:
    if form == "merged":
        return tuple(both[head % len(both)] for head in range(num_heads))
    if form == "divided":
        parts = (first, second)
        return tuple(parts[head % 2][head // 2 % len(parts[head % 2])] for head in range(num_heads))
    part = first if form == "first" else second
    return tuple(part[head % len(part)] for head in range(num_heads))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """What of a sequence's cache the queries of a layer group read, all heads together.

    A query at p reads from p - window + 1 on, or from the beginning of its block of `block` positions, or (neither
    given) everything; besides, in every block of `period` positions before, the offsets summary[0] to summary[1] - 1.
    """

    window: int | None = None
    block: int | None = None
    period: int | None = None
    summary: tuple[int, int] = (0, 0)

    @property
    def everything(self) -> bool:
        return self.window is None and self.block is None

    def near_start(self, position: int) -> int:
        """The position from which on a query at `position` or later may read everything."""
        if self.window is not None:
            return max(0, position - self.window + 1)
        return 0 if self.block is None else position - position % self.block

    def keeps(self, entry: int, block_tokens: int) -> bool:
        """Whether the table's `entry`, a block of `block_tokens` positions, is read by all later queries."""
        if self.everything:
            return True
        kept = _kept_entries(self, block_tokens)
        return bool(kept) and kept[entry % len(kept)]

    def num_kept(self, num_entries: int, block_tokens: int) -> int:
        """How many of a table's first entries `keeps` says yes to. O(1) after the first call."""
        if self.everything:
            return num_entries
        kept = _kept_before(self, block_tokens)
        if len(kept) == 1:
            return 0
        rounds, rest = divmod(num_entries, len(kept) - 1)
        return rounds * kept[-1] + kept[rest]

    def entries(self, position: int, num_entries: int, block_tokens: int) -> Iterator[int]:
        """Those of a table's first entries that a query at `position` or later reads."""
        near = min(self.near_start(position) // block_tokens, num_entries)
        if self.everything or self.period is not None:
            yield from (entry for entry in range(near) if self.keeps(entry, block_tokens))
        yield from range(near, num_entries)

    def most_entries(self, num_tokens: int, *, block_tokens: int, step_tokens: int) -> int:
        """The most entries at once that a sequence of `num_tokens` positions has in use, over steps from anywhere.

        A step from p on reads what is left at p, and writes up to `step_tokens` positions.
        Example: blocks of 4, steps of 4, a window of 6: 5 + 4 positions, which may lie across 3 blocks and touch a
        fourth.
        """
        whole = -(-num_tokens // block_tokens)
        if self.everything:
            return whole

        def held(start: int) -> int:
            near = self.near_start(start) // block_tokens
            end = min(start + step_tokens, num_tokens)
            return -(-end // block_tokens) - near + self.num_kept(near, block_tokens)

        # Later steps hold no less than earlier ones that lie the same way in the cache's blocks, as long as they are
        # full; of those that read from the same position on, the last holds most.
        last = max(0, num_tokens - step_tokens)
        if self.window is not None:
            starts = [max(0, last - back) for back in range(block_tokens)]
        else:
            assert self.block is not None
            number = last // self.block
            rounds = block_tokens // gcd(block_tokens, self.block)
            starts = [last, *(n * self.block - 1 for n in range(number, max(0, number - rounds), -1))]
        return max(held(start) for start in starts)


def reads_of(reaches: Iterable[Reach]) -> Reads:
    """What heads that see so read together.

    Distinct summaries of several heads lie side by side up to the block's end, so they are one run.
    """
    reaches = set(reaches)
    if any(reach.near == "all" or reach.far == "column" for reach in reaches):
        return Reads()
    blocks = {reach.width for reach in reaches if reach.near == "block"}
    windows = {reach.width for reach in reaches if reach.near == "window"}
    spans = {(reach.period, reach.summary) for reach in reaches if reach.far == "summary"}
    assert len(blocks) + bool(windows) <= 1, reaches
    return Reads(
        window=None if blocks else max(windows, default=1),  # 1: a query that sees nothing else sees itself
        block=blocks.pop() if blocks else None,
        period=next(iter(spans))[0] if spans else None,
        summary=(min(span[0] for _, span in spans), max(span[1] for _, span in spans)) if spans else (0, 0),
    )


@cache
def _kept_entries(reads: Reads, block_tokens: int) -> tuple[bool, ...]:
    """For a round of entries, after which it repeats, whether a summary lies in each. Empty where there are none."""
    if reads.period is None:
        return ()
    first, last = reads.summary
    kept = []
    for entry in range(reads.period // gcd(reads.period, block_tokens)):
        begin = entry * block_tokens % reads.period
        own = begin < last and begin + block_tokens > first
        next_one = begin + block_tokens > reads.period + first
        kept.append(own or next_one)
    return tuple(kept)


@cache
def _kept_before(reads: Reads, block_tokens: int) -> tuple[int, ...]:
    """Kept entries among the first 0, 1, 2 ... of a round."""
    return tuple(accumulate(map(int, _kept_entries(reads, block_tokens)), initial=0))
