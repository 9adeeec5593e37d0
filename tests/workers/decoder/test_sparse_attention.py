"""The Sparse Transformer's patterns in every variant, against the paper's definition a query at a time in float64.

Keys that no query of a step sees hold not-a-number, and blocks that no later query reads are gone from the table, so a
variant that visits either gives a wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from workers.decoder.attention import AttentionMetadata, AttentionSpec, KVPool, PlainPool, reference_paged_attention
from workers.decoder.batched_attention import batched_paged_attention
from workers.decoder.kernels import build, native
from workers.decoder.kernels.packed import PackedPool
from workers.decoder.patterns import Fixed, Form, Strided

SEQUENCES = ((1, 1), (1, 13), (9, 9), (3, 11), (1, 126), (0, 5), (26, 130), (60, 190), (1, 16))  # queries, keys in all
FORMS: tuple[Form, ...] = ("merged", "divided", "first", "second")
PATTERNS: list[Strided | Fixed] = [
    *(Strided(stride=stride, form=form) for stride in (1, 7, 24) for form in FORMS),
    *(Fixed(block=12, summary=5, form=form) for form in FORMS),
    Fixed(block=40, summary=1),
    Fixed(block=40, summary=40, form="divided"),
    Fixed(block=1, summary=1),
    Fixed(block=24, summary=5, form="merged", distinct=True),
    Fixed(block=24, summary=7, form="divided", distinct=True),
    Fixed(block=24, summary=5, form="second", distinct=True),
]
SPEC = AttentionSpec(num_heads=6, num_kv_heads=3, head_width=10, value_width=7, scale=0.3)
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi-head, soft-cap": {"num_kv_heads": 6, "softcap": 1.5},
    "multi-query, ALiBi": {"num_kv_heads": 1, "alibi_slopes": tuple(2.0**-i for i in range(6))},
}


@cache
def keys_of(pattern: Strided | Fixed, head: int, i: int) -> set[int]:
    """Child et al. 2019, section 4.3, to the letter; a query whose set is empty sees itself."""
    past = range(i + 1)
    subblock = 0
    if isinstance(pattern, Strided):
        stride = pattern.stride
        first = {j for j in past if j >= max(0, i - stride)}
        second = {j for j in past if (i - j) % stride == 0}
    else:
        block, summary = pattern.block, pattern.summary
        if pattern.distinct:
            subblock = (head // 2 if pattern.form == "divided" else head) % (block // summary)
        first = {j for j in past if j // block == i // block}
        end = block - subblock * summary
        second = {j for j in past if end - summary <= j % block < end}
    chosen = {"merged": first | second, "divided": second if head % 2 else first, "first": first, "second": second}
    return chosen[pattern.form] or {i}


def plain_attention(query: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
    """query [Q, H, D], the last of the positions of keys [L, K, D], values [L, K, Dv] -> [Q, H, Dv] in float64."""
    assert spec.sparse is not None
    length, group = len(keys), spec.num_heads // spec.num_kv_heads
    at, of = torch.arange(length - len(query), length), torch.arange(length)
    seen = torch.zeros(spec.num_heads, len(query), length, dtype=torch.bool)
    for head in range(spec.num_heads):
        for row, i in enumerate(at.tolist()):
            seen[head, row, sorted(keys_of(spec.sparse, head, i))] = True
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,lhd->hql", query.double(), keys) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if spec.alibi_slopes is not None:
        scores = scores + torch.tensor(spec.alibi_slopes)[:, None, None] * (of - at[:, None])
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, len(query), 1)], dim=-1)
    return torch.einsum("hql,lhd->qhd", scores.softmax(-1)[..., :length], values)


class Step:
    """SEQUENCES in one step, in pools where only what the step's queries see is a number."""

    def __init__(self, spec: AttentionSpec, make_pool: Callable[..., KVPool], block_tokens: int) -> None:
        torch.manual_seed(0)
        assert spec.sparse is not None
        self.spec, self.block_tokens = spec, block_tokens
        widest = max(-(-length // block_tokens) for _, length in SEQUENCES)
        num_blocks = widest * len(SEQUENCES)
        self.pool: Any = make_pool(spec, num_blocks, block_tokens, dtype=torch.float32)
        self.pool.keys.fill_(torch.nan)
        self.pool.values.fill_(torch.nan)
        free = torch.randperm(num_blocks).tolist()
        self.table = torch.full((len(SEQUENCES), widest), -1, dtype=torch.int32)
        self.queries, self.keys, self.values, self.starts = [], [], [], [0]
        for s, (num_queries, length) in enumerate(SEQUENCES):
            old, at = length - num_queries, torch.arange(length)
            blocks = torch.tensor([free.pop() for _ in range(-(-length // block_tokens))])
            slots = blocks[at // block_tokens] * block_tokens + at % block_tokens
            key = torch.randn(length, spec.num_kv_heads, spec.head_width)
            value = torch.randn(length, spec.num_kv_heads, spec.value_width)
            heads = range(spec.num_heads)
            seen = {j for i in range(old, length) for head in heads for j in keys_of(spec.sparse, head, i)}
            unseen = torch.tensor([j not in seen for j in range(length)])[:, None, None]
            self.pool.write(key.masked_fill(unseen, torch.nan), value.masked_fill(unseen, torch.nan), slots)
            kept = {j // block_tokens for j in seen}
            self.table[s, : len(blocks)] = torch.where(
                torch.tensor([b in kept for b in range(len(blocks))]), blocks, -1
            )
            self.queries.append(torch.randn(num_queries, spec.num_heads, spec.head_width))
            self.keys.append(key)
            self.values.append(value)
            self.starts.append(self.starts[-1] + num_queries)

    def metadata(self, starts: list[int], lengths: list[int], table: Tensor) -> AttentionMetadata:
        return AttentionMetadata(
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(lengths, dtype=torch.int32),
            block_table=table,
            slots=torch.empty(0, dtype=torch.int64),
        )

    def check(self, attend: Callable[..., Tensor], sinks: Tensor | None = None) -> Tensor:
        metadata = self.metadata(self.starts, [length for _, length in SEQUENCES], self.table)
        got = attend(torch.cat(self.queries), self.pool, metadata, sinks)
        wanted = [
            plain_attention(*of_one, self.spec, sinks)
            for of_one in zip(self.queries, self.keys, self.values, strict=True)
        ]
        torch.testing.assert_close(got, torch.cat(wanted).float(), atol=2e-6, rtol=1e-5)
        return got


def name(pattern: Strided | Fixed) -> str:
    return str(pattern).replace("'", "")


@pytest.mark.parametrize("attend", [reference_paged_attention, batched_paged_attention])
@pytest.mark.parametrize("pattern", PATTERNS, ids=name)
def test_plain_torch_sees_the_papers_keys_and_touches_no_other(
    pattern: Strided | Fixed, attend: Callable[..., Tensor]
) -> None:
    for shape, with_sinks in zip(SHAPES.values(), (False, True, False), strict=True):
        spec = replace(SPEC, sparse=pattern, **shape)
        Step(spec, PlainPool, 4).check(attend, torch.randn(6) if with_sinks else None)


@pytest.mark.skipif(not native.available(), reason=str(build.load().reason))
@pytest.mark.parametrize("pattern", PATTERNS, ids=name)
def test_the_kernel_sees_the_papers_keys_and_touches_no_other_whatever_the_steps_are(pattern: Strided | Fixed) -> None:
    for shape, with_sinks in zip(SHAPES.values(), (False, True, False), strict=True):
        step = Step(replace(SPEC, sparse=pattern, **shape), PackedPool, 16)
        sinks = torch.randn(6) if with_sinks else None
        got = step.check(lambda q, pool, metadata, sinks: pool.attend(q, metadata, sinks), sinks)
        # Cut anywhere into steps of its own, a sequence's queries give the same bits.
        for s, (num_queries, length) in enumerate(SEQUENCES):
            for cut in sorted({1, num_queries // 3, num_queries - 1} - {0, num_queries}):
                table, old = step.table[s : s + 1], length - num_queries
                pieces = [
                    step.pool.attend(queries, step.metadata([0, len(queries)], [end], table), sinks)
                    for queries, end in ((step.queries[s][:cut], old + cut), (step.queries[s][cut:], length))
                ]
                assert torch.equal(torch.cat(pieces), got[step.starts[s] : step.starts[s + 1]])


@pytest.mark.skipif(not native.available(), reason=str(build.load().reason))
def test_gathered_keys_of_a_bfloat16_cache_are_widened_exactly() -> None:
    for pattern in (Strided(stride=7), Fixed(block=12, summary=5)):
        spec = replace(SPEC, sparse=pattern)
        pools = [pool(spec, 8, 16, dtype=torch.bfloat16) for pool in (PackedPool, PlainPool)]
        slots, key, value = torch.arange(100), torch.randn(100, 3, 10), torch.randn(100, 3, 7)
        metadata = AttentionMetadata(
            query_start=torch.tensor([0, 5], dtype=torch.int32),
            context_lens=torch.tensor([100], dtype=torch.int32),
            block_table=torch.arange(8, dtype=torch.int32)[None],
            slots=slots,
        )
        query = torch.randn(5, 6, 10)
        for pool in pools:
            pool.write(key, value, slots)
        torch.testing.assert_close(
            pools[0].attend(query, metadata, None), reference_paged_attention(query, pools[1], metadata)
        )


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (lambda: Strided(stride=0), "stride of 0"),
        (lambda: Fixed(block=8, summary=9), "summary of 9"),
        (lambda: Fixed(block=8, summary=0), "summary of 0"),
        (lambda: replace(SPEC, window=4, sparse=Strided(stride=4)), "not both"),
        (lambda: replace(SPEC, num_heads=1, num_kv_heads=1, sparse=Strided(stride=4, form="divided")), "only one"),
    ],
)
def test_a_pattern_that_makes_no_sense_is_refused(wrong: Callable[[], object], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        wrong()
