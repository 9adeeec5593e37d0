"""The heavy arithmetic. A variant is chosen by the type of the handle; each has its reference here in plain torch.

On the CPU the handles are the C kernels' (kernels/) where those could be built, else the references (weight.py,
int8.py); bfloat16 weights stay with torch where the processor multiplies them itself (AMX, AVX512-BF16), which is
faster than widening them.

T tokens, C input width, N output width, F feed-forward width, H heads, K key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.decoder.attention import (
    AttentionMetadata,
    AttentionSpec,
    KVPool,
    PlainPool,
)
from workers.decoder.batched_attention import batched_paged_attention
from workers.decoder.int8 import Int8Bank, Int8Weight
from workers.decoder.kernels import native
from workers.decoder.kernels.packed import DTYPES, PackedBank, PackedPool, PackedWeight
from workers.decoder.precision import multiplies_bfloat16
from workers.decoder.weight import DenseBank, DenseWeight, ExpertBank, Weight

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def _packs(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cpu" or dtype not in DTYPES or not native.available():
        return False
    return dtype != torch.bfloat16 or not multiplies_bfloat16(device)


def _runs_native(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and native.available()


def new_weight(out_features: int, in_features: int, *, dtype: torch.dtype, device: torch.device) -> Weight:
    """An unfilled weight of the variant that multiplies fastest on `device`. int8 has a scale a row, see int8.py."""
    if _packs(dtype, device):
        return PackedWeight(out_features, in_features, dtype=dtype)
    if dtype == torch.int8:
        return Int8Weight(out_features, in_features, device=device)
    return DenseWeight(torch.empty(out_features, in_features, dtype=dtype, device=device))


def new_bank(
    experts: Sequence[int], out_features: int, in_features: int, *, dtype: torch.dtype, device: torch.device
) -> ExpertBank:
    """An unfilled bank with a slot for each of `experts`."""
    if _packs(dtype, device):
        return PackedBank(experts, out_features, in_features, dtype=dtype)
    if dtype == torch.int8:
        return Int8Bank(experts, out_features, in_features, device=device)
    return DenseBank(experts, out_features, in_features, dtype=dtype, device=device)


def new_pool(
    spec: AttentionSpec, num_blocks: int, block_tokens: int, *, dtype: torch.dtype, device: torch.device
) -> KVPool:
    """An empty pool of the variant that attends fastest with `spec` on `device`."""
    if device.type == "cpu" and native.available() and PackedPool.fits(spec, block_tokens, dtype):
        return PackedPool(spec, num_blocks, block_tokens, dtype=dtype)
    return PlainPool(spec, num_blocks, block_tokens, dtype=dtype, device=device)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [T, C] times weight [N, C] transposed, plus bias [N] -> [T, N] in x's dtype."""
    if isinstance(weight, PackedWeight | Int8Weight):
        return weight.linear(x, bias)
    assert isinstance(weight, DenseWeight), type(weight)
    return _product(x, weight.tensor, bias)


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """x times matrix transposed, in x's dtype, except that bfloat16 is multiplied as such where the hardware can."""
    dtype = matrix.dtype if matrix.dtype != x.dtype and multiplies_bfloat16(x.device) else x.dtype
    return F.linear(x.to(dtype), matrix.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def grouped_linear(x: Tensor, bank: ExpertBank, rows_per_slot: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, C], sorted by slot, each run of rows_per_slot [slots] times its slot's matrix, plus bias [slots, N]."""
    if isinstance(bank, PackedBank):
        return bank.linear(x, rows_per_slot.tolist(), bias)
    assert isinstance(bank, DenseBank | Int8Bank), type(bank)
    out = x.new_empty(x.shape[0], bank.out_features)
    begin = 0
    for slot, rows in enumerate(rows_per_slot.tolist()):
        if rows:
            own_bias = None if bias is None else bias[slot]
            run = x[begin : begin + rows]
            if isinstance(bank, Int8Bank):
                out[begin : begin + rows] = bank.linear(run, slot, own_bias)
            else:
                out[begin : begin + rows] = _product(run, bank.tensor[slot], own_bias)
            begin += rows
    assert begin == x.shape[0], (begin, x.shape)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., C] over its root mean square, times weight [C]; computed in float32, -> x's dtype."""
    if _runs_native(x):
        return native.rms_norm(x, weight, eps)
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x [..., C] less its mean, over its standard deviation, times weight, plus bias; in float32, -> x's dtype."""
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [T, H, D] with column i of each head rotated against column i + half by cosine, sine [T, half] -> [T, H, D].

    Columns from 2 * half on stay as they are (rotary embedding, Su et al. 2021, in the order of GPT-NeoX and Llama).
    """
    if _runs_native(x):
        return native.rotate(x, cosine, sine)
    half = cosine.shape[-1]
    cosine, sine = cosine[:, None].to(x.dtype), sine[:, None].to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)


def act_mul(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """activation(gate) * up for gate_up [T, 2F], the gate in the first half -> [T, F] (Shazeer 2020)."""
    if activation == "silu" and _runs_native(gate_up):
        return native.swiglu(gate_up)
    if activation in ("gelu", "gelu_tanh") and _runs_native(gate_up):
        return native.gelu(gate_up, gated=True, exact=activation == "gelu")
    gate, up = gate_up.chunk(2, dim=-1)
    return _ACTIVATIONS[activation](gate) * up


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """gate * sigmoid(alpha * gate) * (up + 1), gate at most `limit`, up within it, for gate_up [T, 2F] -> [T, F]."""
    if _runs_native(gate_up):
        return native.swiglu(gate_up, alpha=alpha, limit=limit, shift=1.0)
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), elementwise. torch's own gives other bits at the end of a tensor than within it."""
    return native.sigmoid(x) if _runs_native(x) else torch.sigmoid(x)


def act(x: Tensor, activation: str) -> Tensor:
    """activation(x) for x [T, F]."""
    if activation in ("gelu", "gelu_tanh") and _runs_native(x):
        return native.gelu(x, gated=False, exact=activation == "gelu")
    return _ACTIVATIONS[activation](x)


def paged_attention(query: Tensor, pool: KVPool, metadata: AttentionMetadata, sinks: Tensor | None = None) -> Tensor:
    """query [T, H, D] over all keys of its sequence that `pool.spec` lets it see -> [T, H, Dv].

    The step's own keys are in the pool already. sinks [H]: see `reference_paged_attention`.
    """
    if isinstance(pool, PackedPool):
        return pool.attend(query, metadata, sinks)
    assert isinstance(pool, PlainPool), type(pool)
    return batched_paged_attention(query, pool, metadata, sinks)
