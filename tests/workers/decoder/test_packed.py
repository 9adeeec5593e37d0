"""Every variant behind ops.py's functions against its reference."""

from __future__ import annotations

import pytest
import torch

from workers.decoder import ops
from workers.decoder.attention import AttentionMetadata, AttentionSpec, PlainPool
from workers.decoder.kernels import build, native
from workers.decoder.kernels.packed import PackedBank, PackedPool, PackedWeight
from workers.decoder.patterns import Fixed, Strided
from workers.decoder.weight import DenseBank, DenseWeight

pytestmark = pytest.mark.skipif(not native.available(), reason=str(build.load().reason))
CPU = torch.device("cpu")


def test_float32_on_the_cpu_is_packed() -> None:
    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_width=8, value_width=8, scale=1.0)
    assert isinstance(ops.new_weight(4, 4, dtype=torch.float32, device=CPU), PackedWeight)
    assert isinstance(ops.new_bank([0, 2], 4, 4, dtype=torch.float32, device=CPU), PackedBank)
    assert isinstance(ops.new_pool(spec, 2, 16, dtype=torch.float32, device=CPU), PackedPool)
    assert isinstance(ops.new_pool(spec, 2, 4, dtype=torch.float32, device=CPU), PlainPool)  # blocks of part of a panel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_answers_as_a_plain_one(dtype: torch.dtype) -> None:
    matrix, x, bias = torch.randn(37, 20).to(dtype), torch.randn(9, 20), torch.randn(37)
    packed, plain = PackedWeight(37, 20, dtype=dtype), DenseWeight(torch.empty(37, 20, dtype=dtype))
    for weight in (packed, plain):  # in parts whose borders cut through panels, one of them within one
        for first, end in ((0, 20), (20, 22), (22, 37)):
            weight.put(first, matrix[first:end])
    ids = torch.tensor([0, 36, 5, 5, 16])
    assert packed.shape == plain.shape
    assert torch.equal(packed.rows(ids), plain.rows(ids).float())
    torch.testing.assert_close(ops.linear(x, packed, bias), ops.linear(x, plain, bias))


def test_a_packed_bank_answers_as_a_plain_one() -> None:
    banks = [bank([4, 1, 7], 37, 20, dtype=torch.float32) for bank in (PackedBank, DenseBank)]
    for slot in range(3):
        matrix = torch.randn(37, 20)
        for bank in banks:
            bank.put(slot, 0, matrix[:5])
            bank.put(slot, 5, matrix[5:])
    x, bias, runs = torch.randn(8, 20), torch.randn(3, 37), torch.tensor([5, 0, 3])
    torch.testing.assert_close(ops.grouped_linear(x, banks[0], runs, bias), ops.grouped_linear(x, banks[1], runs, bias))
    torch.testing.assert_close(ops.grouped_linear(x, banks[0], runs), ops.grouped_linear(x, banks[1], runs))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("slopes", [None, (0.5, 0.25, 0.125, 1.0)])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_packed_pool_answers_as_a_plain_one(
    window: int | None, softcap: float | None, slopes: tuple[float, ...] | None, with_sinks: bool
) -> None:
    spec = AttentionSpec(
        num_heads=4,
        num_kv_heads=2,
        head_width=12,
        value_width=20,
        scale=0.3,
        window=window,
        softcap=softcap,
        alibi_slopes=slopes,
    )
    assert_pools_agree(spec, with_sinks=with_sinks)


@pytest.mark.parametrize("sparse", [None, Strided(stride=5), Fixed(block=8, summary=3)])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_pool_whose_keys_hold_the_values_answers_as_a_plain_one(
    dtype: torch.dtype, kv_heads: int, sparse: Strided | Fixed | None
) -> None:
    shape = {"num_heads": 26, "num_kv_heads": kv_heads, "head_width": 44, "value_width": 37}
    spec = AttentionSpec(**shape, scale=0.3, values_in_keys=True, sparse=sparse)
    assert_pools_agree(spec, dtype=dtype)
    assert PlainPool(spec, 1, 16, dtype=dtype).nbytes == 16 * kv_heads * 44 * dtype.itemsize
    panel = native.panel_columns()
    assert PackedPool(spec, 1, 16, dtype=dtype).nbytes == 16 * kv_heads * -(-44 // panel) * panel * dtype.itemsize


def assert_pools_agree(spec: AttentionSpec, *, with_sinks: bool = False, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(0)
    pools = [pool(spec, 6, 16, dtype=dtype) for pool in (PackedPool, PlainPool)]
    table = torch.tensor([[4, 1, 5, -1], [2, -1, -1, -1]], dtype=torch.int32)
    lengths = [40, 9]
    slots = torch.cat(
        [table[s][torch.arange(n) // 16].long() * 16 + torch.arange(n) % 16 for s, n in enumerate(lengths)]
    )
    key = torch.randn(49, spec.num_kv_heads, spec.head_width)
    value = None if spec.values_in_keys else torch.randn(49, spec.num_kv_heads, spec.value_width)
    metadata = AttentionMetadata(
        query_start=torch.tensor([0, 3, 12], dtype=torch.int32),
        context_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        slots=slots,
    )
    query = torch.randn(12, spec.num_heads, spec.head_width)
    sinks = torch.randn(spec.num_heads) if with_sinks else None
    answers = []
    for pool in pools:
        pool.write(key, value, slots)
        pool.copy_blocks(torch.tensor([4]), torch.tensor([3]))
        answers.append(ops.paged_attention(query, pool, metadata, sinks))
    torch.testing.assert_close(*answers)
    moved = AttentionMetadata(  # the copied block reads as the one it was copied from
        query_start=metadata.query_start,
        context_lens=metadata.context_lens,
        block_table=torch.where(table == 4, 3, table),
        slots=slots,
    )
    for pool, answer in zip(pools, answers, strict=True):
        assert torch.equal(ops.paged_attention(query, pool, moved, sinks), answer)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.rms_norm(torch.linspace(-3, 3, 70).view(7, 10), torch.linspace(0.5, 1, 10), 1e-5),
        lambda: ops.act_mul(torch.linspace(-30, 30, 84).view(7, 12)),
        lambda: ops.act_mul(torch.linspace(-30, 30, 84).view(7, 12), "gelu"),
        lambda: ops.act_mul(torch.linspace(-30, 30, 84).view(7, 12), "gelu_tanh"),
        lambda: ops.act(torch.linspace(-30, 30, 84).view(7, 12), "gelu"),
        lambda: ops.act(torch.linspace(-30, 30, 84).view(7, 12), "gelu_tanh"),
        lambda: ops.rotate(torch.linspace(-3, 3, 84).view(7, 2, 6), torch.rand(7, 2).sin(), torch.rand(7, 2)),
    ],
)
def test_what_lies_between_the_products_answers_as_plain_torch(call, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    fast = call()
    monkeypatch.setattr(ops, "_runs_native", lambda x: False)
    torch.manual_seed(0)
    torch.testing.assert_close(fast, call())
