"""Which blocks each sequence holds, in every layer group at once. Pure.

Layers with the same attention form a group with its own blocks. In a group whose attention sees only a window, or its
own block of positions and summaries of those before, cache blocks that no later query reads are given back as the
sequence grows, from the middle of the table too: a group's share of the cache fits what its layers read.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from workers.decoder.patterns import EVERYTHING, Reads
from workers.engine.blocks import ROOT, BlockAllocator, chain
from workers.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCache:
    """A layer group's share of the cache, and what of it the group's queries read."""

    num_blocks: int
    reads: Reads = EVERYTHING


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
        """The most blocks of a group that a sequence of `num_tokens` cached positions holds at once, sharing none."""
        return self.groups[group].reads.most_entries(
            num_tokens, block_tokens=self.block_tokens, step_tokens=self.step_tokens
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
        wanted: list[dict[int, int]] = []  # a group: the found blocks it needs, by their places in the table
        for g, allocator in enumerate(self.allocators):
            hits: dict[int, int] = {}
            for index in self.groups[g].reads.entries(found * self.block_tokens, found, self.block_tokens):
                block = allocator.find(sequence.digests[index])
                assert block is not None
                hits[index] = block
            revived = sum(allocator.references(block) == 0 for block in hits.values())
            fresh = max(0, self.blocks_needed(g, len(sequence.tokens)) - len(hits))
            if fresh + reserve > allocator.num_free - revived:
                return False
            wanted.append(hits)
        for g, (allocator, hits) in enumerate(zip(self.allocators, wanted, strict=True)):
            for block in hits.values():
                allocator.share(block)
            sequence.num_trimmed[g] = min(self._near_entry(g, found * self.block_tokens), found)
            sequence.tables[g] = array("i", (hits.get(index, -1) for index in range(found)))
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
            if elder.num_trimmed[g] > self._near_entry(g, end):
                return None
            held = sum(1 for _ in self.groups[g].reads.entries(end, shared, self.block_tokens))
            fresh = self.blocks_needed(g, len(sequence.tokens)) - held
            if max(fresh, 1 if part else 0) + reserve > allocator.num_free:
                return None
        for g, allocator in enumerate(self.allocators):
            table = array("i", [-1] * shared)
            for index in self.groups[g].reads.entries(end, shared, self.block_tokens):
                table[index] = elder.tables[g][index]
                allocator.share(table[index])
            sequence.num_trimmed[g] = min(self._near_entry(g, end), shared)
            sequence.tables[g] = table
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
            if not cache.reads.everything:
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
            for block in reversed(table):
                if block >= 0:
                    allocator.free(block)
            sequence.num_trimmed[g] = 0
        sequence.tables = self.new_tables()
        sequence.num_computed = 0
        sequence.settled = False

    def forget_all(self) -> None:
        for allocator in self.allocators:
            allocator.forget_all()

    def _near_entry(self, group: int, position: int) -> int:
        """The table entry from which on a query at `position` or later may read everything."""
        return self.groups[group].reads.near_start(position) // self.block_tokens

    def _trim(self, sequence: Sequence, group: int) -> None:
        table, allocator, reads = sequence.tables[group], self.allocators[group], self.groups[group].reads
        end = min(self._near_entry(group, sequence.num_computed), len(table))
        for index in range(sequence.num_trimmed[group], end):
            if not reads.keeps(index, self.block_tokens):
                allocator.free(table[index])
                table[index] = -1
        sequence.num_trimmed[group] = max(end, sequence.num_trimmed[group])

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
        for g, cache in enumerate(self.groups):  # what is read for ever must be there from the beginning on
            allocator, found = self.allocators[g], 0
            while found < most and (
                not cache.reads.keeps(found, self.block_tokens) or allocator.find(sequence.digests[found]) is not None
            ):
                found += 1
            most = found
        passing = [g for g, cache in enumerate(self.groups) if not cache.reads.everything]
        while most and not all(self._near_is_held(sequence, g, most) for g in passing):
            most -= 1
        return most

    def _near_is_held(self, sequence: Sequence, group: int, num_blocks: int) -> bool:
        allocator = self.allocators[group]
        first = self._near_entry(group, num_blocks * self.block_tokens)
        return all(allocator.find(digest) is not None for digest in sequence.digests[first:num_blocks])
