"""Which blocks each sequence holds, in every layer group at once. Pure.

Layers with the same attention form a group with its own blocks. In a group whose attention sees only a window, blocks
before the window are given back as the sequence grows, so a group's share of the cache fits what its layers read.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from workers.engine.blocks import ROOT, BlockAllocator, chain
from workers.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCache:
    """A layer group's share of the cache. A query at position p reads positions p - window + 1 to p (None: 0 to p)."""

    num_blocks: int
    window: int | None = None


def blocks_needed(num_tokens: int, *, window: int | None, block_tokens: int, step_tokens: int) -> int:
    """The most blocks of a group that a sequence of `num_tokens` cached positions holds at once, sharing none.

    Example: blocks of 4, steps of 4 tokens, a window of 6: a step reads or writes 5 + 4 positions, which may lie across
    3 blocks and touch a fourth.
    """
    whole = -(-num_tokens // block_tokens)
    if window is None:
        return whole
    span = window - 1 + min(step_tokens, num_tokens)
    return min(whole, -(-(span - 1) // block_tokens) + 1)


class BlockTables:
    """Gives blocks to sequences and takes them back.

    `step_tokens` is the most tokens of one sequence that a step computes. With `reuse_prefixes` false no block is
    found again by its content; samples of one request share their prompt's blocks all the same.
    """

    def __init__(
        self, groups: tuple[GroupCache, ...], *, block_tokens: int, step_tokens: int, reuse_prefixes: bool = True
    ) -> None:
        self.groups = groups
        self.block_tokens = block_tokens
        self.step_tokens = step_tokens
        self.reuse_prefixes = reuse_prefixes
        self.allocators = tuple(BlockAllocator(group.num_blocks) for group in groups)

    def new_tables(self) -> list[array[int]]:
        return [array("i") for _ in self.groups]

    def blocks_needed(self, group: int, num_tokens: int) -> int:
        """See the function of this name."""
        return blocks_needed(
            num_tokens,
            window=self.groups[group].window,
            block_tokens=self.block_tokens,
            step_tokens=self.step_tokens,
        )

    def could_ever_hold(self, num_tokens: int) -> bool:
        return all(self.blocks_needed(g, num_tokens) <= cache.num_blocks for g, cache in enumerate(self.groups))

    def most_tokens(self) -> int:
        """The longest sequence that the empty cache holds; for messages."""
        low, high = 0, 1
        while self.could_ever_hold(high) and high < 2**40:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.could_ever_hold(middle) else (low, middle)
        return low

    def admit(self, sequence: Sequence, reserve: int) -> bool:
        """Start a sequence from what the cache already holds of it, if all its tokens' blocks are to be had now.

        `reserve` blocks a group are left free for those that run already. Sets num_computed to the positions found; at
        least the last token is always left to compute. False, and nothing changed, where there is no room.
        """
        found = self._match(sequence) if sequence.reuses_prefix and self.reuse_prefixes else 0
        wanted: list[list[int]] = []  # a group: the found blocks it needs
        for g, allocator in enumerate(self.allocators):
            hits = []
            for digest in sequence.digests[self._first_read(g, found * self.block_tokens) : found]:
                block = allocator.find(digest)
                assert block is not None
                hits.append(block)
            revived = sum(allocator.references(block) == 0 for block in hits)
            fresh = max(0, self.blocks_needed(g, len(sequence.tokens)) - len(hits))
            if fresh + reserve > allocator.num_free - revived:
                return False
            wanted.append(hits)
        for g, (allocator, hits) in enumerate(zip(self.allocators, wanted, strict=True)):
            for block in hits:
                allocator.share(block)
            sequence.first_kept[g] = found - len(hits)
            sequence.tables[g] = array("i", [-1] * (found - len(hits)) + hits)
        sequence.num_computed = found * self.block_tokens
        return True

    def fork(self, sequence: Sequence, reserve: int) -> list[list[tuple[int, int]]] | None:
        """Start a later sample from the prompt's blocks of its request's first one, while that one holds them.

        The prompt's last block, if the prompt fills only part of it, is copied, since both samples go on writing there.
        -> these copies (source, target), a list a group, to be made before the step's arithmetic. None, and nothing
        changed, where there is no such first sample any more or no room; `reserve` as for `admit`.
        """
        elder, end = sequence.elder, sequence.num_prompt
        if elder is None or not elder.settled or elder.num_computed < end or len(sequence.tokens) == end:
            return None
        shared, part = divmod(end, self.block_tokens)
        copies: list[list[tuple[int, int]]] = []
        for g, allocator in enumerate(self.allocators):
            if elder.first_kept[g] > self._first_read(g, end):
                return None
            fresh = self.blocks_needed(g, len(sequence.tokens)) - (shared - self._first_read(g, end))
            if max(fresh, 1 if part else 0) + reserve > allocator.num_free:
                return None
        for g, allocator in enumerate(self.allocators):
            first = self._first_read(g, end)
            held = elder.tables[g][first:shared]
            for block in held:
                allocator.share(block)
            sequence.first_kept[g] = first
            sequence.tables[g] = array("i", [-1] * first) + held
            copies.append([])
            if part:
                target = allocator.allocate()
                sequence.tables[g].append(target)
                copies[g].append((elder.tables[g][shared], target))
        sequence.digests = elder.digests[:shared]
        sequence.num_computed = end
        return copies

    def extend(self, sequence: Sequence, end: int) -> bool:
        """Blocks for positions below `end`, where computing goes on at num_computed; False where there are too few.

        Blocks that no position from num_computed on will read are given back, in either case.
        """
        num_blocks = -(-end // self.block_tokens)
        for g, cache in enumerate(self.groups):
            if cache.window is not None:
                self._trim(sequence, g)
            if num_blocks - len(sequence.tables[g]) > self.allocators[g].num_free:
                return False
        for table, allocator in zip(sequence.tables, self.allocators, strict=True):
            while len(table) < num_blocks:
                table.append(allocator.allocate())
        return True

    def publish(self, sequence: Sequence, start: int, end: int) -> None:
        """Make the blocks that positions start..end-1 complete findable, from now on in this same scheduling pass."""
        first, last = start // self.block_tokens, end // self.block_tokens
        if first == last or not (sequence.reuses_prefix and self.reuse_prefixes):
            return
        self._digest(sequence, last)
        for table, allocator in zip(sequence.tables, self.allocators, strict=True):
            for index in range(first, last):
                allocator.publish(table[index], sequence.digests[index])

    def release(self, sequence: Sequence) -> None:
        """Give all blocks back, the last first, so that of its prefix the beginning stays findable longest."""
        for g, (table, allocator) in enumerate(zip(sequence.tables, self.allocators, strict=True)):
            for index in range(len(table) - 1, sequence.first_kept[g] - 1, -1):
                allocator.free(table[index])
            sequence.first_kept[g] = 0
        sequence.tables = self.new_tables()
        sequence.num_computed = 0
        sequence.settled = False

    def forget_all(self) -> None:
        for allocator in self.allocators:
            allocator.forget_all()

    def _first_read(self, group: int, position: int) -> int:
        """The first table entry that a query at `position` or later reads."""
        window = self.groups[group].window
        return 0 if window is None else max(0, position - window + 1) // self.block_tokens

    def _trim(self, sequence: Sequence, group: int) -> None:
        table, allocator = sequence.tables[group], self.allocators[group]
        keep = min(self._first_read(group, sequence.num_computed), len(table))
        for index in range(sequence.first_kept[group], keep):
            allocator.free(table[index])
            table[index] = -1
        sequence.first_kept[group] = max(keep, sequence.first_kept[group])

    def _digest(self, sequence: Sequence, num_blocks: int) -> None:
        digests, width = sequence.digests, self.block_tokens
        parent = digests[-1] if digests else ROOT
        for index in range(len(digests), num_blocks):
            parent = chain(parent, sequence.tokens[index * width : (index + 1) * width])
            digests.append(parent)

    def _match(self, sequence: Sequence) -> int:
        """The longest run of leading full blocks that every group can still read from, short of the last token."""
        most = len(sequence.tokens) - 1
        if sequence.awaits_vector:
            most = min(most, sequence.most_reused)
        most //= self.block_tokens
        self._digest(sequence, most)
        for g, cache in enumerate(self.groups):
            if cache.window is None:
                allocator, found = self.allocators[g], 0
                while found < most and allocator.find(sequence.digests[found]) is not None:
                    found += 1
                most = found
        windowed = [g for g, cache in enumerate(self.groups) if cache.window is not None]
        while most and not all(self._window_is_held(sequence, g, most) for g in windowed):
            most -= 1
        return most

    def _window_is_held(self, sequence: Sequence, group: int, num_blocks: int) -> bool:
        allocator = self.allocators[group]
        first = self._first_read(group, num_blocks * self.block_tokens)
        return all(allocator.find(digest) is not None for digest in sequence.digests[first:num_blocks])
