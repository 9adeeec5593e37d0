"""The blocks of one layer group's KV pool: who holds them, and which still hold a known prefix. Pure.

A block is `block_tokens` consecutive positions of one sequence, in every layer of the group. Several sequences may hold
the same block. A block that nobody holds is free; if it was filled whole it stays findable by its prefix until it is
given to someone else, the one free longest first.

A prefix's digest chains: digest(block) = H(digest(block before), the block's token ids). Equal digests therefore mean
equal tokens from position 0 on, which is what makes the keys and values equal. H is 128-bit BLAKE2b: rows are other
people's text, and a hash that they can make collide would let one row read another's cache.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import blake2b

ROOT = bytes(16)  # the digest before the first block


def chain(parent: bytes, tokens: array[int]) -> bytes:
    """The digest of the prefix that ends with the block `tokens`, given that of the prefix before it. About 1 us."""
    return blake2b(parent + tokens.tobytes(), digest_size=16).digest()


class BlockAllocator:
    """Reference-counted blocks 0..num_blocks-1. Every operation is O(1)."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))  # free, nothing findable in them; the end is taken first
        self._findable: OrderedDict[int, None] = OrderedDict()  # free but findable; the longest free first

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._findable)

    def references(self, block: int) -> int:
        """How many sequences hold `block`."""
        return self._references[block]

    def allocate(self) -> int:
        """A block held once, its content unknown. The caller has seen that num_free > 0."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._findable.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def find(self, digest: bytes) -> int | None:
        """The block, held or free, that holds the prefix with this digest; it is not taken yet: see `share`."""
        return self._by_digest.get(digest)

    def share(self, block: int) -> None:
        """Hold a block that somebody holds or that `find` gave just now."""
        if self._references[block] == 0:
            del self._findable[block]
        self._references[block] += 1

    def free(self, block: int) -> None:
        """Hold `block` once less."""
        count = self._references[block] - 1
        assert count >= 0, f"block {block} freed more often than held"
        self._references[block] = count
        if count == 0:
            if self._digests[block] is None:
                self._blank.append(block)
            else:
                self._findable[block] = None

    def publish(self, block: int, digest: bytes) -> None:
        """Make a held block findable. It must be filled whole by the end of the step being scheduled.

        Where another block holds the same prefix already, that one stays the findable one.
        """
        if digest not in self._by_digest:
            assert self._references[block] > 0
            assert self._digests[block] is None
            self._digests[block] = digest
            self._by_digest[digest] = block

    def forget_all(self) -> None:
        """Nothing is findable any more; who holds what is unchanged."""
        self._by_digest.clear()
        self._digests = [None] * self.num_blocks
        self._blank.extend(self._findable)
        self._findable.clear()

    def _forget(self, block: int) -> None:
        digest = self._digests[block]
        assert digest is not None
        del self._by_digest[digest]
        self._digests[block] = None
