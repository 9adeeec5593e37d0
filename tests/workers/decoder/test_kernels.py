"""The C kernels against plain torch in float64, and the rule that a row's bits don't depend on its neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.decoder.kernels import build, native
from workers.decoder.patterns import Reach

pytestmark = pytest.mark.skipif(not native.available(), reason=str(build.load().reason))


def close(got: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> None:
    worst = (got.double() - wanted.double()).abs().max().item()
    assert worst <= tolerance * max(1.0, wanted.abs().max().item()), worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 1, 1), (5, 33, 7), (7, 16, 256), (100, 50, 600), (193, 17, 513)]
)
def test_a_packed_product_is_the_plain_product(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x, matrix, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs).to(dtype), torch.randn(outputs)
    got = native.matmul(x, native.pack(matrix), outputs, bias)
    close(got, x.double() @ matrix.double().T + bias, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_row_of_a_product_has_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, matrix = torch.randn(420, 700), torch.randn(96, 700) * (40 if dtype == torch.int8 else 1)
    packed, scales = native.pack(matrix.to(dtype)), torch.rand(96) if dtype == torch.int8 else None
    whole = native.matmul(x, packed, 96, None, scales)
    for rows in (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 96, 97, 191, 192, 193, 400):
        for start in (0, 1):
            part = native.matmul(x[start : start + rows], packed, 96, None, scales)
            assert torch.equal(part, whole[start : start + rows])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_a_product_by_rows_or_by_columns_to_the_same_bits(threads: int) -> None:
    torch.manual_seed(0)
    runs = [601, 0, 7, 203]  # more rows than threads have bands, and fewer
    x, matrices = torch.randn(sum(runs), 300), native.pack(torch.randn(4, 70, 300))
    alone = [native.matmul(part, one, 70) for part, one in zip(x.split(runs), matrices, strict=True)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(5):
            assert torch.equal(native.grouped_matmul(x, matrices, 70, runs), torch.cat(alone))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 1, 1), (5, 33, 7), (7, 16, 256), (100, 50, 600), (193, 17, 513)]
)
def test_a_product_with_8_bit_integers_is_the_plain_product_times_the_scales(
    rows: int, outputs: int, inputs: int
) -> None:
    torch.manual_seed(rows)
    x, bias = torch.randn(rows, inputs), torch.randn(outputs)
    matrix = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    packed = native.pack(matrix)
    scales = torch.rand(packed.shape[0] * packed.shape[2])
    got = native.matmul(x, packed, outputs, bias, scales)
    close(got, x.double() @ (matrix.double() * scales[:outputs, None]).T + bias, 1e-5)


def test_each_run_of_rows_meets_its_own_slot() -> None:
    torch.manual_seed(0)
    runs, x = [3, 0, 14, 1], torch.randn(18, 40)
    matrices, bias = torch.randn(4, 20, 40), torch.randn(4, 20)
    got = native.grouped_matmul(x, native.pack(matrices), 20, runs, bias)
    parts = [part @ matrix.T + b for part, matrix, b in zip(x.split(runs), matrices, bias, strict=True)]
    close(got, torch.cat(parts), 1e-5)


def test_no_rows_give_no_rows() -> None:
    assert native.matmul(torch.empty(0, 8), native.pack(torch.randn(5, 8)), 5).shape == (0, 5)
    assert native.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)


@pytest.mark.parametrize("width", [1, 10, 64, 577])
def test_rms_norm(width: int) -> None:
    x, weight = torch.randn(33, width) * 3, torch.rand(width) + 0.5
    close(native.rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), 1e-5))


@pytest.mark.parametrize("width", [1, 10, 72])
def test_silu_times_up_also_far_from_zero(width: int) -> None:
    gate_up = torch.randn(9, 2 * width) * torch.tensor([0.1, 1.0, 50.0])[torch.arange(9) % 3][:, None]
    gate, up = gate_up.double().chunk(2, dim=1)
    close(native.swiglu(gate_up), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("width", [1, 10, 72])
def test_a_clamped_swiglu_bounds_gate_and_up(width: int) -> None:
    gate_up = torch.randn(9, 2 * width) * torch.tensor([0.1, 1.0, 50.0])[torch.arange(9) % 3][:, None]
    gate, up = gate_up.double().chunk(2, dim=1)
    gate, up = gate.clamp(max=2.0), up.clamp(-2.0, 2.0)
    close(native.swiglu(gate_up, alpha=1.7, limit=2.0, shift=1.0), gate * torch.sigmoid(1.7 * gate) * (up + 1))
    assert native.swiglu(torch.full((1, 2 * width), torch.nan), limit=2.0).isnan().all()


def test_sigmoid_has_the_same_bits_wherever_a_number_stands() -> None:
    x = torch.linspace(-100, 100, 77)
    got = native.sigmoid(x)
    close(got, torch.sigmoid(x.double()))
    assert all(
        torch.equal(native.sigmoid(x[begin : begin + n]), got[begin : begin + n]) for begin, n in ((0, 5), (3, 30))
    )


@pytest.mark.parametrize("width", [1, 10, 72])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_gelu_and_that_an_element_does_not_depend_on_its_neighbours(width: int, exact: bool, gated: bool) -> None:
    x = torch.randn(9, 2 * width) * torch.tensor([0.1, 1.0, 50.0])[torch.arange(9) % 3][:, None]
    gate, up = x.double().chunk(2, dim=1) if gated else (x.double(), torch.ones(()).double())
    got = native.gelu(x, gated=gated, exact=exact)
    close(got, torch.nn.functional.gelu(gate, approximate="none" if exact else "tanh") * up)
    for row in range(9):
        assert torch.equal(native.gelu(x[row : row + 1], gated=gated, exact=exact), got[row : row + 1])


def test_rotation_pairs_each_column_with_the_one_half_a_head_away() -> None:
    x, angle = torch.randn(5, 3, 12), torch.randn(5, 4)
    cosine, sine = angle.cos(), angle.sin()
    first, second, rest = x[..., :4], x[..., 4:8], x[..., 8:]
    c, s = cosine[:, None], sine[:, None]
    wanted = torch.cat([first * c - second * s, second * c + first * s, rest], dim=-1)
    close(native.rotate(x, cosine, sine), wanted)
    fused = torch.randn(5, 60)  # heads cut from a fused product: tokens lie apart
    fused[:, 12:48] = x.reshape(5, 36)
    assert torch.equal(native.rotate(fused[:, 12:48].view(5, 3, 12), cosine, sine), native.rotate(x, cosine, sine))


# name: heads, key-value heads, head width, value width, window, softcap, slopes, sinks, dtype of the cache
CASES = {
    "grouped": (9, 3, 64, 64, None, None, False, False, torch.float32),
    "window, odd widths": (6, 3, 10, 10, 7, None, False, False, torch.float32),
    "softcap, slopes and sinks": (4, 4, 16, 24, None, 5.0, True, True, torch.float32),
    "one key-value head, bfloat16": (8, 1, 80, 80, 40, None, False, True, torch.bfloat16),
    "values in keys": (26, 1, 44, 37, None, None, False, False, torch.float32),
    "values in keys, bfloat16": (7, 1, 96, 64, 40, 5.0, True, True, torch.bfloat16),
}
SEQUENCES = ((1, 1), (1, 50), (33, 33), (7, 90), (70, 200), (1, 256))  # queries in this step, keys in all
BLOCK_TOKENS = 32


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence, float64: query [Q, H, D] are the last of the positions of key [L, K, D], value [L, K, Dv]."""
    (queries, heads, _), (keys, kv_heads, _) = query.shape, key.shape
    key, value = (x.double().repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    scores = torch.einsum("qhd,lhd->hql", query.double(), key) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at, of = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)[None]
    if slopes is not None:
        scores = scores + slopes.double()[:, None, None] * (of - at)
    hidden = of > at
    if window:
        hidden = hidden | (of <= at - window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(heads, queries, 1)], -1)
    return torch.einsum("hql,lhd->qhd", scores.softmax(-1)[..., :keys], value)


@pytest.mark.parametrize("case", CASES)
def test_attention_over_pages(case: str) -> None:
    heads, kv_heads, width, value_width, window, softcap, with_slopes, with_sinks, dtype = CASES[case]
    torch.manual_seed(0)
    slopes = torch.rand(heads) if with_slopes else None
    sinks = torch.randn(heads) if with_sinks else None
    lengths = [keys for _, keys in SEQUENCES]
    blocks = [-(-n // BLOCK_TOKENS) for n in lengths]
    in_keys = case.startswith("values in keys")
    own_width = None if in_keys else value_width
    pool_keys, pool_values = native.new_pages(sum(blocks) + 1, kv_heads, BLOCK_TOKENS, width, own_width, dtype)
    free = (torch.randperm(sum(blocks)) + 1).tolist()  # block 0 stays empty: nobody may read it
    table = torch.full((len(SEQUENCES), max(blocks)), -1, dtype=torch.int32)
    queries, wanted, start = [], [], [0]
    for i, (num_queries, num_keys) in enumerate(SEQUENCES):
        table[i, : blocks[i]] = torch.tensor([free.pop() for _ in range(blocks[i])])
        key = torch.randn(num_keys, kv_heads, width).to(dtype).float()
        value = torch.randn(num_keys, kv_heads, value_width).to(dtype).float()
        if in_keys:
            value = key[..., :value_width]
        at = torch.arange(num_keys)
        slots = table[i][at // BLOCK_TOKENS].long() * BLOCK_TOKENS + at % BLOCK_TOKENS
        native.write_pages(pool_keys, pool_values, key, None if in_keys else value, slots)
        queries.append(torch.randn(num_queries, heads, width))
        start.append(start[-1] + num_queries)
        wanted.append(plain_attention(queries[-1], key, value, width**-0.5, window, softcap, slopes, sinks))

    def attend(query: Tensor, query_start: list[int], context_lens: list[int], rows: Tensor) -> Tensor:
        return native.attention(
            query,
            pool_keys,
            pool_values,
            query_start=torch.tensor(query_start),
            context_lens=torch.tensor(context_lens),
            block_table=rows,
            value_width=value_width,
            scale=width**-0.5,
            runs=None if window is None else native.head_runs([Reach(near="window", width=window)] * heads, kv_heads),
            softcap=softcap,
            slopes=slopes,
            sinks=sinks,
        )

    got = attend(torch.cat(queries), start, lengths, table)
    close(got, torch.cat(wanted), 5e-6)
    # Cut anywhere into steps of its own, a sequence's queries give the same bits.
    for i, (num_queries, num_keys) in enumerate(SEQUENCES):
        for cut in sorted({1, num_queries // 3, num_queries - 1} - {0, num_queries}):
            first = attend(queries[i][:cut], [0, cut], [num_keys - num_queries + cut], table[i : i + 1])
            second = attend(queries[i][cut:], [0, num_queries - cut], [num_keys], table[i : i + 1])
            assert torch.equal(torch.cat([first, second]), got[start[i] : start[i + 1]])


def test_what_a_neighbour_left_in_a_block_is_not_seen() -> None:
    """A block's unused tail may hold another row's not-a-number: it must not reach this row."""
    keys, values = native.new_pages(1, 1, BLOCK_TOKENS, 8, 8, torch.float32)
    keys.fill_(float("nan"))
    values.fill_(float("nan"))
    key, value = torch.randn(5, 1, 8), torch.randn(5, 1, 8)
    native.write_pages(keys, values, key, value, torch.arange(5))
    query = torch.randn(1, 2, 8)
    got = native.attention(
        query,
        keys,
        values,
        query_start=torch.tensor([0, 1]),
        context_lens=torch.tensor([5]),
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        value_width=8,
        scale=1.0,
    )
    close(got, plain_attention(query, key, value, 1.0, None, None, None, None))


def test_a_missing_compiler_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    build.load.cache_clear()
    try:
        built = build.load()
        assert built.library is None
        assert built.reason is not None
        assert "no-such-compiler" in built.reason
        assert "\n" not in built.reason
    finally:
        monkeypatch.undo()
        build.load.cache_clear()
        native._library.cache_clear()
