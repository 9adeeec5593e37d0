"""How much memory the cache of keys and values gets, how it is split among the layer groups, and the pools themselves.

The budget is kept: pools are made once, never grown, and together never exceed it. `auto` is what max_sequences
sequences that fill their context could use at most, but no more than a quarter of the main memory that is available
when the engine is made (weights are loaded by then), or 85% of what a GPU has free. On CPU the operating system
provides pages as they are first written, so a short job never touches most of it. Engines that are told that they share
a machine's memory take a part of that quarter each.

Groups share the budget so that sequences of TYPICAL_TOKENS fill all of them at the same time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from workers.decoder.attention import KVPool
from workers.decoder.model import Decoder
from workers.engine.block_tables import GroupCache, blocks_needed

TYPICAL_TOKENS = 1024
HOST_SHARE = 0.25
DEVICE_SHARE = 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupNeed:
    """What a layer group's blocks cost: `block_bytes` is a block in all of its layers."""

    block_bytes: int
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What the engine asks of its cache."""

    block_tokens: int
    step_tokens: int
    max_context: int
    max_sequences: int

    def blocks(self, need: GroupNeed, num_tokens: int) -> int:
        return blocks_needed(
            num_tokens, window=need.window, block_tokens=self.block_tokens, step_tokens=self.step_tokens
        )

    def most_bytes(self, needs: Sequence[GroupNeed]) -> int:
        """What max_sequences sequences that fill their context take: more could not be used."""
        return self.max_sequences * sum(self.blocks(need, self.max_context) * need.block_bytes for need in needs)


def split_budget(needs: Sequence[GroupNeed], budget_bytes: int, shape: CacheShape) -> tuple[GroupCache, ...]:
    """Blocks for each group, within `budget_bytes` in all. ValueError if it doesn't buy one block a group."""
    typical = [shape.blocks(need, min(TYPICAL_TOKENS, shape.max_context)) for need in needs]
    together = sum(blocks * need.block_bytes for blocks, need in zip(typical, needs, strict=True))
    groups = []
    for blocks, need in zip(typical, needs, strict=True):
        most = shape.max_sequences * shape.blocks(need, shape.max_context)
        groups.append(GroupCache(num_blocks=min(most, budget_bytes * blocks // together), window=need.window))
    if any(group.num_blocks < 1 for group in groups):
        least = max(-(-together // blocks) for blocks in typical)
        raise ValueError(
            f"kv_cache_bytes is {budget_bytes}, which holds no block of {shape.block_tokens} tokens; "
            f"the least that does is {least}"
        )
    return tuple(groups)


def auto_budget_bytes(needs: Sequence[GroupNeed], shape: CacheShape, device: torch.device, sharers: int = 1) -> int:
    """The rule for `auto`, at the top of this page, for one of `sharers` engines on a host; GPUs are not shared."""
    share = DEVICE_SHARE if device.type == "cuda" else HOST_SHARE / sharers
    return min(shape.most_bytes(needs), int(share * available_bytes(device)))


def available_bytes(device: torch.device) -> int:
    """Free memory of a GPU; of the host, what can be had without swapping, within this process's control groups."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return min([int(line.split()[1]) * 1024, *_control_group_bytes()])


def _control_group_bytes() -> list[int]:
    found = []
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if Path(limit).exists() and Path(usage).exists():
            most = Path(limit).read_text().strip()
            if most != "max":
                found.append(max(0, int(most) - int(Path(usage).read_text())))
    return found


class KVCache:
    """The pools of all layers, with `groups[g].num_blocks` blocks in every layer of group g."""

    def __init__(self, decoder: Decoder, groups: tuple[GroupCache, ...], block_tokens: int) -> None:
        self.groups = groups
        self.block_tokens = block_tokens
        self.pools: list[KVPool] = decoder.new_pools([group.num_blocks for group in groups], block_tokens)
        self._device = decoder.device
        self._layers = [group.layers for group in decoder.groups]

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self.pools)

    def copy_blocks(self, copies: list[list[tuple[int, int]]]) -> None:
        """Copy blocks (source, target), a list a group, in every layer of the group."""
        for layers, pairs in zip(self._layers, copies, strict=True):
            if pairs:
                sources, targets = torch.tensor(pairs, dtype=torch.int64, device=self._device).T.contiguous()
                for layer in layers:
                    self.pools[layer].copy_blocks(sources, targets)
