"""The C kernels as functions on tensors.

T tokens, S sequences, H query heads, K key-value heads, D head width, N and C output and input widths.

All take contiguous float32 activations on the CPU and return new float32 tensors. Weights may be bfloat16, or 8-bit
integers with a scale an output row; caches may be bfloat16. Both are widened exactly. An output row's bits depend on
its own inputs only, not on how many rows came with it.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workers.decoder.kernels.build import load
from workers.decoder.patterns import Reach

_int64 = ctypes.c_int64
_float = ctypes.c_float
_pointer = ctypes.c_void_p
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # of packed weights, as matmul.c numbers them


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("query", "keys", "values", "query_start", "context_lens", "block_table")),
        *((name, _pointer) for name in ("slopes", "sinks", "heads", "reaches", "out")),
        *((name, _int64) for name in ("query_stride", "S", "B", "H", "K", "R", "D", "value_width", "block_tokens")),
        ("bf16", _int64),
        ("scale", _float),
        ("softcap", _float),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = load().library
    assert library is not None, "ask available() first"
    for name in ("gristmill_panel", "gristmill_keys", "gristmill_widest_value", "gristmill_attention"):
        getattr(library, name).restype = _int64
    return library


def available() -> bool:
    """Whether the kernels were built; `build.load().reason` says why not."""
    return load().library is not None


@functools.cache
def panel_columns() -> int:
    """Output columns that a packed weight keeps together."""
    return int(_library().gristmill_panel())


@functools.cache
def panel_keys() -> int:
    """Keys that a paged cache keeps together: a block holds a multiple of it."""
    return int(_library().gristmill_keys())


@functools.cache
def widest_value() -> int:
    """The widest value head that attention takes, and the widest key that it gathers."""
    return int(_library().gristmill_widest_value())


def pack(matrix: Tensor) -> Tensor:
    """[..., N, C] -> [..., ceil(N / P), C, P] with P = panel_columns(), the last panel filled up with zeros."""
    *lead, rows, columns = matrix.shape
    panel = panel_columns()
    packed = matrix.new_zeros(*lead, -(-rows // panel), columns, panel)
    pack_rows(packed, 0, matrix)
    return packed


def pack_rows(packed: Tensor, first: int, matrix: Tensor) -> None:
    """Make matrix [..., n, C] the rows first ... first + n - 1 of packed [..., panels, C, P]."""
    *lead, rows, columns = matrix.shape
    panel = packed.shape[-1]
    at, done = first // panel, 0
    if first % panel:  # fill up the panel that an earlier part began
        done = min(rows, panel - first % panel)
        packed[..., at, :, first % panel : first % panel + done] = matrix[..., :done, :].transpose(-1, -2)
        at += 1
    whole, end = (rows - done) // panel, done + (rows - done) // panel * panel
    panels = matrix[..., done:end, :].reshape(*lead, whole, panel, columns)
    packed[..., at : at + whole, :, :] = panels.transpose(-1, -2)
    if end < rows:
        packed[..., at + whole, :, : rows - end] = matrix[..., end:, :].transpose(-1, -2)


def matmul(
    x: Tensor, packed: Tensor, out_features: int, bias: Tensor | None = None, scales: Tensor | None = None
) -> Tensor:
    """x [T, C] times a packed matrix [panels, C, P] -> [T, N]; bias [N] and scales [panels * P] float32."""
    bias, scales = (None if one is None else one[None] for one in (bias, scales))
    return grouped_matmul(x, packed.unsqueeze(0), out_features, [x.shape[0]], bias, scales)


def grouped_matmul(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    rows_per_slot: list[int],
    bias: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """x [T, C] in runs of rows_per_slot, each times its slot's matrix of packed [slots, panels, C, P] -> [T, N].

    bias is [slots, N] float32. T is the sum of rows_per_slot. int8 matrices come with scales [slots, panels * P]
    float32, one an output column, by which the sums are multiplied before bias is added.
    """
    x = _plain(x)
    slots, panels, width, panel = packed.shape
    assert x.shape[1] == width, (x.shape, packed.shape)
    assert len(rows_per_slot) == slots, (len(rows_per_slot), slots)
    assert sum(rows_per_slot) == x.shape[0], (rows_per_slot, x.shape)
    assert packed.is_contiguous()
    assert (scales is not None) == (packed.dtype == torch.int8), packed.dtype
    if scales is not None:
        assert scales.shape == (slots, panels * panel), (scales.shape, packed.shape)
        scales = _plain(scales)
    if bias is not None:
        assert bias.shape == (slots, out_features)
        bias = torch.nn.functional.pad(_plain(bias), (0, panels * panel - out_features))
    out = torch.empty(x.shape[0], out_features)
    _library().gristmill_matmul(
        _pointer(x.data_ptr()),
        _pointer(packed.data_ptr()),
        _int64(_KINDS[packed.dtype]),
        None if scales is None else _pointer(scales.data_ptr()),
        (_int64 * slots)(*rows_per_slot),
        _int64(slots),
        _int64(width),
        _int64(out_features),
        None if bias is None else _pointer(bias.data_ptr()),
        _pointer(out.data_ptr()),
        _threads(),
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, C] over its root mean square, times weight [C] float32."""
    x = _plain(x)
    out = torch.empty_like(x)
    _library().gristmill_rms_norm(
        _pointer(x.data_ptr()),
        _pointer(_plain(weight).data_ptr()),
        _float(eps),
        _int64(x.numel() // x.shape[-1] if x.numel() else 0),
        _int64(x.shape[-1]),
        _pointer(out.data_ptr()),
        _threads(),
    )
    return out


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), elementwise."""
    x = _plain(x)
    out = torch.empty_like(x)
    _library().gristmill_sigmoid(_pointer(x.data_ptr()), _int64(x.numel()), _pointer(out.data_ptr()))
    return out


def swiglu(gate_up: Tensor, *, alpha: float = 1.0, limit: float = math.inf, shift: float = 0.0) -> Tensor:
    """gate * sigmoid(alpha * gate) * (up + shift), gate at most `limit`, up within it, for gate_up [T, 2F] -> [T, F].

    The gate is in the first half. As it stands: silu(gate) * up.
    """
    gate_up = _plain(gate_up)
    tokens, width = gate_up.shape
    out = torch.empty(tokens, width // 2)
    _library().gristmill_swiglu(
        _pointer(gate_up.data_ptr()),
        _int64(tokens),
        _int64(width // 2),
        _float(alpha),
        _float(limit),
        _float(shift),
        _pointer(out.data_ptr()),
        _threads(),
    )
    return out


def gelu(x: Tensor, *, gated: bool, exact: bool) -> Tensor:
    """gelu(x) for x [T, F]; gated: gelu(gate) * up for x [T, 2F]. Not exact: by its approximation with tanh."""
    x = _plain(x)
    tokens, width = x.shape
    width = width // 2 if gated else width
    out = torch.empty(tokens, width)
    _library().gristmill_gelu(
        _pointer(x.data_ptr()),
        _int64(tokens),
        _int64(width),
        _int64(gated),
        _int64(exact),
        _pointer(out.data_ptr()),
        _threads(),
    )
    return out


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [T, H, D] with column i of each head rotated against column i + half by cosine, sine [T, half]."""
    x = _heads(x)
    tokens, heads, width = x.shape
    cosine, sine = _plain(cosine), _plain(sine)
    out = torch.empty(tokens, heads, width)
    _library().gristmill_rotate(
        _pointer(x.data_ptr()),
        _int64(x.stride(0)),
        _pointer(cosine.data_ptr()),
        _pointer(sine.data_ptr()),
        _int64(tokens),
        _int64(heads),
        _int64(width),
        _int64(cosine.shape[1]),
        _pointer(out.data_ptr()),
        _threads(),
    )
    return out


def new_pages(
    num_blocks: int, num_kv_heads: int, block_tokens: int, head_width: int, value_width: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Empty pools of keys and values in the layout that `attention` reads (attention.c says which).

    value_width None: the keys hold the values, so there is no second pool.

    Whatever the memory held: `attention` never lets a slot that was not written reach a result. So the operating system
    provides pages as they are first written, and a large cache costs nothing until it is used.
    """
    assert block_tokens % panel_keys() == 0
    panel = panel_columns()
    if value_width is None:
        return torch.empty(num_blocks, num_kv_heads, block_tokens, -(-head_width // panel) * panel, dtype=dtype), None
    keys = torch.empty(num_blocks, num_kv_heads, block_tokens // panel_keys(), head_width, panel_keys(), dtype=dtype)
    values = torch.empty(num_blocks, num_kv_heads, block_tokens, -(-value_width // panel) * panel, dtype=dtype)
    return keys, values


def write_pages(keys: Tensor, values: Tensor | None, key: Tensor, value: Tensor | None, slots: Tensor) -> None:
    """Write key [T, K, D] and value [T, K, Dv] to slots [T] int64 (block * block_tokens + offset) of the pools."""
    assert (values is None) == (value is None)
    key, value = _heads(key), None if value is None else _heads(value)
    _library().gristmill_write(
        _pointer(key.data_ptr()),
        _int64(key.stride(0)),
        None if value is None else _pointer(value.data_ptr()),
        _int64(0 if value is None else value.stride(0)),
        _pointer(slots.contiguous().data_ptr()),
        _int64(key.shape[0]),
        _int64(key.shape[1]),
        _int64(key.shape[2]),
        _int64(0 if value is None else value.shape[2]),
        _int64(_block_tokens(keys)),
        _int64(_is_bf16(keys)),
        _pointer(keys.data_ptr()),
        None if values is None else _pointer(values.data_ptr()),
        _threads(),
    )


_NEAR = {"all": 0, "window": 1, "block": 2, "none": 3}  # as attention.c numbers them
_FAR = {"none": 0, "column": 1, "summary": 2}


class HeadRuns(NamedTuple):
    """Which query heads are computed together, and what they see."""

    heads: Tensor  # int32 [H] query heads, those that share a key-value head and a reach side by side
    reaches: Tensor  # int32 [R, 9], each of a run of `heads`: attention.c's `reach`


def head_runs(reaches: Sequence[Reach], num_kv_heads: int) -> HeadRuns:
    """`reaches`: what each query head sees."""
    group = len(reaches) // num_kv_heads
    order: list[int] = []
    runs = []
    for kv_head in range(num_kv_heads):
        own = range(kv_head * group, (kv_head + 1) * group)
        for reach in dict.fromkeys(reaches[head] for head in own):
            heads = [head for head in own if reaches[head] == reach]
            near, far = (_NEAR[reach.near], reach.width), (_FAR[reach.far], reach.period, *reach.summary)
            runs.append((kv_head, len(order), len(heads), *near, *far))
            order += heads
    return HeadRuns(torch.tensor(order, dtype=torch.int32), torch.tensor(runs, dtype=torch.int32))


@functools.cache
def _full_runs(num_heads: int, num_kv_heads: int) -> HeadRuns:
    return head_runs([Reach()] * num_heads, num_kv_heads)


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    *,
    query_start: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    value_width: int,
    scale: float,
    runs: HeadRuns | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query [T, H, D] over the pools -> [T, H, value_width]; the metadata is int32, slopes and sinks [H] float32.

    The sequence of context length L that has q queries in this step has them at positions L - q ... L - 1; each sees
    the keys at its position and before, or of those what `runs` say of each head. Without `values` a key's first
    value_width columns are its value.
    """
    query = _heads(query)
    tokens, heads, width = query.shape
    out = torch.empty(tokens, heads, value_width)
    held = [t.to(torch.int32).contiguous() for t in (query_start, context_lens, block_table)]
    extra = [None if t is None else _plain(t) for t in (slopes, sinks)]
    runs = runs or _full_runs(heads, keys.shape[1])
    call = _Attention(
        query=query.data_ptr(),
        keys=keys.data_ptr(),
        values=None if values is None else values.data_ptr(),
        query_start=held[0].data_ptr(),
        context_lens=held[1].data_ptr(),
        block_table=held[2].data_ptr(),
        slopes=None if extra[0] is None else extra[0].data_ptr(),
        sinks=None if extra[1] is None else extra[1].data_ptr(),
        heads=runs.heads.data_ptr(),
        reaches=runs.reaches.data_ptr(),
        out=out.data_ptr(),
        query_stride=query.stride(0),
        S=held[1].shape[0],
        B=held[2].shape[1],
        H=heads,
        K=keys.shape[1],
        R=runs.reaches.shape[0],
        D=width,
        value_width=value_width,
        block_tokens=_block_tokens(keys),
        bf16=_is_bf16(keys),
        scale=scale,
        softcap=softcap or 0.0,
    )
    if _library().gristmill_attention(ctypes.byref(call), _threads()) != 0:
        raise MemoryError(f"no memory for the list of attention's tasks ({tokens} tokens, {keys.shape[1]} heads)")
    return out


def _block_tokens(keys: Tensor) -> int:
    """Of a pool of keys in panels [.., panels, D, KEYS], or in rows [.., block_tokens, columns] that are values too."""
    return keys.shape[2] * keys.shape[4] if keys.ndim == 5 else keys.shape[2]


def _plain(x: Tensor) -> Tensor:
    assert x.device.type == "cpu", x.device
    return x.to(torch.float32).contiguous()


def _heads(x: Tensor) -> Tensor:
    """[T, heads, width] float32 whose heads lie together; tokens may lie apart, as slices of one product do."""
    assert x.device.type == "cpu", x.device
    x = x.to(torch.float32)
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _is_bf16(pool: Tensor) -> int:
    assert pool.dtype in (torch.float32, torch.bfloat16), pool.dtype
    return int(pool.dtype == torch.bfloat16)


def _threads() -> ctypes.c_int64:
    return _int64(torch.get_num_threads())
