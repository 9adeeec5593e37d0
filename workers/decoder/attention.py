"""What attention over a paged KV cache works on, and the reference for it in plain torch.

T tokens of a step, S sequences, B blocks in a table's row, H query heads, K key-value heads (each serves H / K query
heads: Ainslie et al. 2023), D head width, Dv value width, L cached positions of one sequence.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from workers.decoder.patterns import Fixed, Reach, Reads, Strided, reads_of


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """How a layer attends. Layers with equal specs form a group with one block table and one cache layout.

    A query at position p sees keys at positions p - window + 1 to p (window None: 0 to p), or with `sparse` those of a
    factorised pattern (patterns.py says which). With `softcap` c a score s becomes c * tanh(s / c) (Gemma 2); with
    `alibi_slopes` a query head's slope times (key position - query position) is added (Press et al. 2022).
    `values_in_keys`: the values are the first value_width columns of the keys and cached with them, once (latent
    attention).
    """

    num_heads: int
    num_kv_heads: int
    head_width: int
    value_width: int
    scale: float
    window: int | None = None
    sparse: Strided | Fixed | None = None
    softcap: float | None = None
    alibi_slopes: tuple[float, ...] | None = None
    values_in_keys: bool = False

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads can't be shared by {self.num_kv_heads} key-value heads")
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window of {self.window} keys leaves a query nothing to see")
        if self.window is not None and self.sparse is not None:
            raise ValueError("a layer's pattern is a window or a factorised one, not both")
        if self.sparse is not None and self.sparse.form == "divided" and self.num_heads < 2:
            raise ValueError("a pattern's two parts can't be divided among heads where there is only one")
        if self.alibi_slopes is not None and len(self.alibi_slopes) != self.num_heads:
            raise ValueError(f"{len(self.alibi_slopes)} ALiBi slopes for {self.num_heads} query heads")
        if self.values_in_keys and self.value_width > self.head_width:
            raise ValueError(f"keys of {self.head_width} columns hold no values of {self.value_width}")

    @property
    def pattern(self) -> str:
        match self.sparse:
            case Strided():
                return "strided"
            case Fixed():
                return "fixed"
        return "full" if self.window is None else "sliding"

    @property
    def cached_width(self) -> int:
        """Numbers that a token's cache holds in one layer."""
        return self.num_kv_heads * (self.head_width + (0 if self.values_in_keys else self.value_width))

    @property
    def reaches(self) -> tuple[Reach, ...]:
        """What each query head sees."""
        return _reaches(self.window, self.sparse, self.num_heads)

    @property
    def reads(self) -> Reads:
        """What of the cache all heads together read."""
        return reads_of(self.reaches)


@cache
def _reaches(window: int | None, sparse: Strided | Fixed | None, num_heads: int) -> tuple[Reach, ...]:
    if sparse is not None:
        return sparse.reaches(num_heads)
    return (Reach() if window is None else Reach(near="window", width=window),) * num_heads


def visible(spec: AttentionSpec, query_at: Tensor, key_at: Tensor) -> Tensor:
    """Which keys at positions key_at [..., L] a query at query_at [..., 1] sees -> bool [H, ..., L].

    The first dimension is 1 where all heads see alike.
    """
    found = {reach: _seen(reach, query_at, key_at) for reach in dict.fromkeys(spec.reaches)}
    return torch.stack([found[reach] for reach in (spec.reaches if len(found) > 1 else spec.reaches[:1])])


def _seen(reach: Reach, query_at: Tensor, key_at: Tensor) -> Tensor:
    match reach.near:
        case "all":
            seen = key_at >= 0
        case "window":
            seen = key_at > query_at - reach.width
        case "block":
            seen = key_at // reach.width == query_at // reach.width
        case "none":
            seen = (key_at == query_at) & (query_at < reach.summary[0])  # nothing else to see
    match reach.far:
        case "column":
            seen = seen | ((query_at - key_at) % reach.period == 0)
        case "summary":
            offset = key_at % reach.period
            seen = seen | ((offset >= reach.summary[0]) & (offset < reach.summary[1]))
    return seen & (key_at <= query_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """Where one layer group finds each sequence's keys in one step. All tensors lie on the model's device.

    All of a step's keys are written before attention reads any, so one sequence may read blocks that another fills in
    the same step. Example: sequence 0 decodes its 6th token, sequence 1 prefills 3 tokens, blocks of 4 tokens:

        query_start [0, 1, 4]   context_lens [6, 3]   block_table [[7, 2], [5, -1]]   slots [2*4+1, 5*4, 5*4+1, 5*4+2]
    """

    query_start: Tensor  # int32 [S + 1]: sequence s has the step's tokens query_start[s] to query_start[s + 1] - 1
    context_lens: Tensor  # int32 [S]: keys visible to the sequence's last query, this step's included
    block_table: Tensor  # int32 [S, B]: block of position p is [p // block_tokens]; -1: freed or unused, never read
    slots: Tensor  # int64 [T]: block * block_tokens + offset where each of the step's tokens is written


class KVPool(ABC):
    """One layer's share of the KV cache. How keys and values lie in it is its own business."""

    spec: AttentionSpec
    num_blocks: int
    block_tokens: int
    dtype: torch.dtype

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of memory held."""

    @abstractmethod
    def write(self, key: Tensor, value: Tensor | None, slots: Tensor) -> None:
        """Write key [T, K, D] and value [T, K, Dv] at slots [T] int64 (block * block_tokens + offset).

        value is None exactly where the spec says that the keys hold the values.
        """

    @abstractmethod
    def copy_blocks(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole blocks: sources [n] and targets [n] int64, no block in both."""


class PlainPool(KVPool):
    """Keys [num_blocks, block_tokens, K, D] and values [num_blocks, block_tokens, K, Dv], or a view of the keys."""

    def __init__(
        self,
        spec: AttentionSpec,
        num_blocks: int,
        block_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.dtype = dtype
        shape = (num_blocks, block_tokens, spec.num_kv_heads)
        # Zeros: what was never written is masked, but 0 * NaN would not be.
        self.keys = _zeros((*shape, spec.head_width), dtype, torch.device(device))
        if spec.values_in_keys:
            self.values = self.keys[..., : spec.value_width]
        else:
            self.values = _zeros((*shape, spec.value_width), dtype, torch.device(device))

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + (0 if self.spec.values_in_keys else self.values.nbytes)

    def write(self, key: Tensor, value: Tensor | None, slots: Tensor) -> None:
        assert (value is None) == self.spec.values_in_keys
        self.keys.flatten(0, 1).index_copy_(0, slots, key.to(self.dtype))
        if value is not None:
            self.values.flatten(0, 1).index_copy_(0, slots, value.to(self.dtype))

    def copy_blocks(self, sources: Tensor, targets: Tensor) -> None:
        self.keys[targets] = self.keys[sources]
        if not self.spec.values_in_keys:
            self.values[targets] = self.values[sources]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that, on the CPU, the operating system provides page by page as they are first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def reference_paged_attention(
    query: Tensor, pool: PlainPool, metadata: AttentionMetadata, sinks: Tensor | None = None
) -> Tensor:
    """query [T, H, D] over the pool -> [T, H, Dv], a sequence at a time, scores and sums in float32.

    sinks [H]: a score without a value that takes its share of each query head's softmax (gpt-oss).
    """
    spec = pool.spec
    group = spec.num_heads // spec.num_kv_heads
    out = query.new_zeros(query.shape[0], spec.num_heads, spec.value_width)
    starts = metadata.query_start.tolist()
    slopes = None if spec.alibi_slopes is None else torch.tensor(spec.alibi_slopes, device=query.device)
    for sequence, length in enumerate(metadata.context_lens.tolist()):
        begin, end = starts[sequence], starts[sequence + 1]
        num_queries = end - begin
        if num_queries == 0:
            continue
        first_query = length - num_queries
        query_at = torch.arange(first_query, length, device=query.device)[:, None]
        first_key = 0 if spec.sparse is not None else spec.reads.near_start(first_query)
        key_at = torch.arange(first_key, length, device=query.device)
        seen = visible(spec, query_at, key_at)  # [H or 1, Q, L]
        read = seen.any(dim=0).any(dim=0).nonzero()[:, 0]  # keys that no query sees are never touched
        key_at, seen = key_at[read], seen[..., read]
        blocks = metadata.block_table[sequence, key_at // pool.block_tokens].long()
        slots = blocks * pool.block_tokens + key_at % pool.block_tokens
        keys = pool.keys.flatten(0, 1)[slots].float()  # [L, K, D]
        values = pool.values.flatten(0, 1)[slots].float()  # [L, K, Dv]

        queries = query[begin:end].float().reshape(-1, spec.num_kv_heads, group, spec.head_width)  # [Q, K, G, D]
        scores = torch.einsum("qkgd,lkd->kgql", queries, keys).flatten(0, 1) * spec.scale  # [H, Q, L]
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        if slopes is not None:
            scores = scores + slopes[:, None, None] * (key_at - query_at)
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            sink = sinks.float()[:, None, None].expand(-1, num_queries, 1)
            weights = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = scores.softmax(dim=-1)
        weights = weights.view(spec.num_kv_heads, group, num_queries, -1)  # [K, G, Q, L]
        result = torch.einsum("kgql,lkv->qkgv", weights, values)  # [Q, K, G, Dv]
        out[begin:end] = result.flatten(1, 2).to(out.dtype)
    return out
