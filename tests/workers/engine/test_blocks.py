from __future__ import annotations

from array import array

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.engine.blocks import ROOT, BlockAllocator, chain


def digest(number: int) -> bytes:
    return chain(ROOT, array("q", [number]))


def test_a_block_freed_by_its_last_holder_is_free_again() -> None:
    allocator = BlockAllocator(2)
    block = allocator.allocate()
    allocator.share(block)
    allocator.free(block)
    assert allocator.num_free == 1
    allocator.free(block)
    assert allocator.num_free == 2


def test_a_freed_block_is_found_by_its_prefix_until_it_is_taken() -> None:
    allocator = BlockAllocator(1)
    block = allocator.allocate()
    allocator.publish(block, digest(1))
    allocator.free(block)
    assert allocator.find(digest(1)) == block
    allocator.share(block)
    assert allocator.num_free == 0
    allocator.free(block)
    assert allocator.allocate() == block
    assert allocator.find(digest(1)) is None


def test_blocks_that_hold_nothing_are_taken_before_findable_ones_and_of_those_the_longest_free() -> None:
    allocator = BlockAllocator(4)
    blocks = [allocator.allocate() for _ in range(4)]
    for number in (2, 0, 1):
        allocator.publish(blocks[number], digest(number))
    for number in (2, 0, 1, 3):
        allocator.free(blocks[number])
    allocator.share(blocks[2])  # used again: now it is the one free for the shortest time
    allocator.free(blocks[2])
    assert [allocator.allocate() for _ in range(4)] == [blocks[3], blocks[0], blocks[1], blocks[2]]


def test_a_prefix_held_by_two_blocks_stays_findable_in_the_first() -> None:
    allocator = BlockAllocator(2)
    first, second = allocator.allocate(), allocator.allocate()
    allocator.publish(first, digest(1))
    allocator.publish(second, digest(1))
    allocator.free(second)
    assert allocator.find(digest(1)) == first
    assert allocator.allocate() == second
    assert allocator.find(digest(1)) == first


def test_the_same_tokens_after_another_prefix_have_another_digest() -> None:
    tokens = array("q", [1, 2])
    assert chain(chain(ROOT, array("q", [3])), tokens) != chain(chain(ROOT, array("q", [4])), tokens)


class Allocation(RuleBasedStateMachine):
    """Any order of operations, against a model that keeps plain lists."""

    NUM_BLOCKS = 5

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(self.NUM_BLOCKS)
        self.held: list[int] = []  # a block once for every holder
        self.content: dict[int, bytes] = {}  # what is findable in a block
        self.freed_in_order: list[int] = []

    @precondition(lambda self: self.allocator.num_free > 0)
    @rule()
    def allocate(self) -> None:
        block = self.allocator.allocate()
        assert block not in self.held
        if len(self.freed_in_order) == self.NUM_BLOCKS - len(set(self.held)):  # only findable blocks were free
            assert block == self.freed_in_order[0]
        if block in self.freed_in_order:
            self.freed_in_order.remove(block)
        self.content.pop(block, None)
        self.held.append(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.held.remove(block)
        self.allocator.free(block)
        if block not in self.held and block in self.content:
            self.freed_in_order.append(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), number=st.integers(0, 5))
    def publish(self, data: st.DataObject, number: int) -> None:
        candidates = [block for block in self.held if block not in self.content]
        if candidates:
            block = data.draw(st.sampled_from(candidates))
            self.allocator.publish(block, digest(number))
            if digest(number) not in self.content.values():
                self.content[block] = digest(number)

    @rule(number=st.integers(0, 5))
    def share_what_is_found(self, number: int) -> None:
        block = self.allocator.find(digest(number))
        assert (block is not None) == (digest(number) in self.content.values())
        if block is not None:
            assert self.content[block] == digest(number)
            self.allocator.share(block)
            if block in self.freed_in_order:
                self.freed_in_order.remove(block)
            self.held.append(block)

    @rule()
    def forget(self) -> None:
        self.allocator.forget_all()
        self.content.clear()
        self.freed_in_order.clear()

    @invariant()
    def every_block_is_counted_once(self) -> None:
        assert self.allocator.num_free == self.NUM_BLOCKS - len(set(self.held))
        for block in range(self.NUM_BLOCKS):
            assert self.allocator.references(block) == self.held.count(block)


Allocation.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAllocation = Allocation.TestCase
