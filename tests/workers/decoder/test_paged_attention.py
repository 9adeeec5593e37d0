"""Attention over pages, the reference and the batched variant, against a query at a time in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from workers.decoder import ops
from workers.decoder.attention import AttentionMetadata, AttentionSpec, PlainPool, reference_paged_attention
from workers.decoder.batched_attention import batched_paged_attention

BLOCK_TOKENS = 4
SEQUENCES = ((1, 1), (1, 13), (9, 9), (3, 11), (1, 26), (0, 5), (6, 30))  # queries in this step, keys in all

GROUPED = AttentionSpec(num_heads=6, num_kv_heads=3, head_width=10, value_width=10, scale=0.3)
CASES = {
    "grouped": GROUPED,
    "multi-head": replace(GROUPED, num_kv_heads=6),
    "multi-query": replace(GROUPED, num_kv_heads=1),
    "wide values": replace(GROUPED, value_width=7),
    "window": replace(GROUPED, window=5),
    "window of one": replace(GROUPED, window=1),
    "soft-cap": replace(GROUPED, softcap=1.5),
    "ALiBi": replace(GROUPED, alibi_slopes=tuple(2.0**-i for i in range(6))),
    "all of it": replace(GROUPED, window=6, softcap=2.0, alibi_slopes=tuple(0.5**i for i in range(6))),
}


def one_query_at_a_time(
    query: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec, position: int, sinks: Tensor | None
) -> Tensor:
    """query [H, D] at `position` over keys [L, K, D], values [L, K, Dv] -> [H, Dv], in float64, by the definition."""
    out = []
    for head in range(spec.num_heads):
        kv_head = head // (spec.num_heads // spec.num_kv_heads)
        first = 0 if spec.window is None else max(0, position - spec.window + 1)
        scores = []
        for at in range(first, position + 1):
            score = float(query[head].double() @ keys[at, kv_head].double()) * spec.scale
            if spec.softcap is not None:
                score = spec.softcap * math.tanh(score / spec.softcap)
            if spec.alibi_slopes is not None:
                score += spec.alibi_slopes[head] * (at - position)
            scores.append(score)
        exponentials = [math.exp(s) for s in scores]
        total = sum(exponentials) + (0.0 if sinks is None else math.exp(float(sinks[head])))
        weights = torch.tensor(exponentials, dtype=torch.float64) / total
        out.append(weights @ values[first : position + 1, kv_head].double())
    return torch.stack(out)


@pytest.mark.parametrize("attend", [reference_paged_attention, batched_paged_attention])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_prefill_and_decode_in_one_step_see_exactly_their_own_keys(
    case: str, with_sinks: bool, attend: Callable[..., Tensor]
) -> None:
    spec = CASES[case]
    torch.manual_seed(0)
    num_blocks = 32
    pool = PlainPool(spec, num_blocks, BLOCK_TOKENS, dtype=torch.float32)
    free = torch.randperm(num_blocks).tolist()
    sinks = torch.randn(spec.num_heads) if with_sinks else None
    keys = [torch.randn(length, spec.num_kv_heads, spec.head_width) for _, length in SEQUENCES]
    values = [torch.randn(length, spec.num_kv_heads, spec.value_width) for _, length in SEQUENCES]
    table = torch.full((len(SEQUENCES), 8), -1, dtype=torch.int32)
    starts, new_slots, new_keys, new_values, queries = [0], [], [], [], []
    for s, (num_queries, length) in enumerate(SEQUENCES):
        blocks = [free.pop() for _ in range(-(-length // BLOCK_TOKENS))]
        slots = torch.tensor([blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for p in range(length)])
        old = length - num_queries
        pool.write(keys[s][:old], values[s][:old], slots[:old])
        new_slots.append(slots[old:])
        new_keys.append(keys[s][old:])
        new_values.append(values[s][old:])
        queries.append(torch.randn(num_queries, spec.num_heads, spec.head_width))
        starts.append(starts[-1] + num_queries)
        table[s, : len(blocks)] = torch.tensor(blocks)
        if spec.window is not None:  # blocks that no query of this step reads are given back
            table[s, : max(0, length - max(num_queries, 1) - spec.window + 1) // BLOCK_TOKENS] = -1
    metadata = AttentionMetadata(
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor([length for _, length in SEQUENCES], dtype=torch.int32),
        block_table=table,
        slots=torch.cat(new_slots),
    )
    pool.write(torch.cat(new_keys), torch.cat(new_values), metadata.slots)
    got = attend(torch.cat(queries), pool, metadata, sinks)
    wanted = [
        one_query_at_a_time(queries[s][i], keys[s], values[s], spec, length - num_queries + i, sinks)
        for s, (num_queries, length) in enumerate(SEQUENCES)
        for i in range(num_queries)
    ]
    torch.testing.assert_close(got, torch.stack(wanted).float(), atol=2e-6, rtol=1e-5)


def test_copied_blocks_hold_what_their_sources_held() -> None:
    pool = ops.new_pool(GROUPED, 6, BLOCK_TOKENS, dtype=torch.float32, device=torch.device("cpu"))
    key = torch.randn(BLOCK_TOKENS, 3, 10)
    pool.write(key, key + 1, torch.arange(BLOCK_TOKENS))
    pool.copy_blocks(torch.tensor([0]), torch.tensor([4]))
    query = torch.randn(1, 6, 10)

    def attend(block: int) -> Tensor:
        metadata = AttentionMetadata(
            query_start=torch.tensor([0, 1], dtype=torch.int32),
            context_lens=torch.tensor([BLOCK_TOKENS], dtype=torch.int32),
            block_table=torch.tensor([[block]], dtype=torch.int32),
            slots=torch.tensor([0]),
        )
        return ops.paged_attention(query, pool, metadata)

    assert torch.equal(attend(4), attend(0))
    assert not torch.equal(attend(3), attend(0))


@pytest.mark.parametrize(
    "wrong", [{"num_kv_heads": 4}, {"window": 0}, {"alibi_slopes": (1.0,)}], ids=lambda wrong: next(iter(wrong))
)
def test_a_spec_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        replace(GROUPED, **wrong)
