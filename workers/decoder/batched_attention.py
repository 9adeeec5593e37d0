"""Attention over pages without the C kernels, on GPUs too: decoding sequences side by side, in torch's own product.

T tokens, S sequences, n of them in a batch, B blocks, L keys, H query heads, K key-value heads, G = H / K, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.decoder.attention import AttentionMetadata, AttentionSpec, PlainPool, reference_paged_attention, visible

_BATCH = 32  # sequences of like length gathered at once: their keys stay in the processor's cache
_KEYS = 32  # masked keys in multiples of this leave torch's attention unchanged to the bit


def batched_paged_attention(
    query: Tensor, pool: PlainPool, metadata: AttentionMetadata, sinks: Tensor | None = None
) -> Tensor:
    """As `reference_paged_attention`. What torch's attention can't express (soft-cap, sinks) goes to the reference."""
    if pool.spec.softcap is not None or sinks is not None:
        return reference_paged_attention(query, pool, metadata, sinks)
    counts = metadata.query_start.diff()  # [S]
    out = query.new_empty(query.shape[0], pool.spec.num_heads, pool.spec.value_width)
    if bool((counts > 1).any()):  # the reference passes over sequences without queries
        others = torch.where(counts == 1, 0, counts)
        rows = torch.repeat_interleave(counts != 1, counts)
        rest = AttentionMetadata(
            query_start=F.pad(others.cumsum(0), (1, 0)).int(),
            context_lens=metadata.context_lens,
            block_table=metadata.block_table,
            slots=metadata.slots,
        )
        out[rows] = reference_paged_attention(query[rows], pool, rest)
    single = (counts == 1).nonzero()[:, 0]
    longest_first = single[metadata.context_lens[single].argsort(descending=True, stable=True)]
    for first in range(0, longest_first.numel(), _BATCH):
        batch = longest_first[first : first + _BATCH]
        tokens = metadata.query_start[batch].long()
        out[tokens] = _decode(query[tokens], pool, metadata.context_lens[batch], metadata.block_table[batch])
    return out


def _decode(query: Tensor, pool: PlainPool, lengths: Tensor, table: Tensor) -> Tensor:
    """query [n, H, D], one of each sequence, lengths [n], table [n, B] -> [n, H, Dv]."""
    spec, width = pool.spec, pool.block_tokens
    lengths, group = lengths.long(), spec.num_heads // spec.num_kv_heads
    if spec.sparse is not None:
        return _decode_sparse(query, pool, lengths, table)
    first_block = torch.zeros_like(lengths) if spec.window is None else (lengths - spec.window).clamp(min=0) // width
    num_blocks = int(((lengths - 1) // width - first_block).max()) + 1
    step = _KEYS // math.gcd(_KEYS, width)
    num_blocks = -(-num_blocks // step) * step
    at = first_block[:, None] + torch.arange(num_blocks, device=query.device)  # [n, B'] entries of the table
    blocks = table.gather(1, at.clamp(max=table.shape[1] - 1)).clamp(min=0).flatten().long()
    shape = (lengths.numel(), num_blocks * width, spec.num_kv_heads, -1)
    keys = pool.keys.flatten(1).index_select(0, blocks).view(shape).to(query.dtype)  # [n, L, K, D]
    if spec.values_in_keys:
        values = keys[..., : spec.value_width]
    else:
        values = pool.values.flatten(1).index_select(0, blocks).view(shape).to(query.dtype)  # [n, L, K, Dv]
    key_at = first_block[:, None] * width + torch.arange(num_blocks * width, device=query.device)
    mask = _mask(key_at - (lengths - 1)[:, None], spec, query.dtype)
    out = F.scaled_dot_product_attention(
        query.view(
            -1, spec.num_kv_heads, group, spec.head_width
        ),  # the group as if it were queries: no key is repeated
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        scale=spec.scale,
    )
    return out.flatten(1, 2)


def _decode_sparse(query: Tensor, pool: PlainPool, lengths: Tensor, table: Tensor) -> Tensor:
    """As `_decode`, from only the keys that some head sees: gathered one by one, in the order of their positions."""
    spec, width = pool.spec, pool.block_tokens
    query_at = lengths[:, None] - 1  # [n, 1]
    seen = visible(spec, query_at, torch.arange(int(lengths.max()), device=query.device))  # [H or 1, n, L]
    counts = seen.any(dim=0).sum(dim=1)
    num_keys = -(-int(counts.max()) // _KEYS) * _KEYS
    first = (~seen.any(dim=0)).int().argsort(dim=1, stable=True)[:, :num_keys]  # [n, L'] seen ones first
    first = F.pad(first, (0, num_keys - first.shape[1]))
    filler = torch.arange(num_keys, device=query.device) >= counts[:, None]
    key_at = torch.where(filler, first[:, :1], first)  # filled up with a key that is there, masked
    slots = table.gather(1, key_at // width).long() * width + key_at % width
    shape = (*slots.shape, spec.num_kv_heads, -1)
    keys = pool.keys.flatten(0, 1).index_select(0, slots.flatten()).view(shape).to(query.dtype)  # [n, L', K, D]
    values = pool.values.flatten(0, 1).index_select(0, slots.flatten()).view(shape).to(query.dtype)
    distance = (key_at - query_at)[:, None, None].to(query.dtype)
    bias = torch.zeros_like(distance)
    if spec.alibi_slopes is not None:
        bias = torch.tensor(spec.alibi_slopes, device=query.device, dtype=query.dtype).view(spec.num_kv_heads, -1, 1)
        bias = bias * distance
    hidden = ~visible(spec, query_at, key_at) | filler  # [H or 1, n, L']
    kv_heads = spec.num_kv_heads if len(hidden) > 1 else 1
    hidden = hidden.transpose(0, 1).reshape(len(query), kv_heads, -1, num_keys)  # [n, K or 1, G or 1, L']
    out = F.scaled_dot_product_attention(
        query.view(len(query), spec.num_kv_heads, -1, spec.head_width),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=torch.where(hidden, -torch.inf, bias),
        scale=spec.scale,
    )
    return out.flatten(1, 2)


def _mask(distance: Tensor, spec: AttentionSpec, dtype: torch.dtype) -> Tensor:
    """distance [n, L] of each key from its query -> what is added to the scores, [n, 1 or K, 1 or G, L]."""
    hidden = distance > 0
    if spec.window is not None:
        hidden = hidden | (distance <= -spec.window)
    bias = distance.new_zeros((), dtype=dtype).expand(distance.shape)[:, None, None]
    if spec.alibi_slopes is not None:
        slopes = torch.tensor(spec.alibi_slopes, dtype=dtype, device=distance.device)
        bias = slopes.view(spec.num_kv_heads, -1, 1) * distance[:, None, None]
    return bias.masked_fill(hidden[:, None, None], -torch.inf)
