"""Handles whose data lies as the C kernels read it. The references are in weight.py and attention.py.

Activations are float32 here, whatever the weights are: bfloat16 weights and caches and 8-bit weights (see int8.py) are
widened as they are read, so that they cost half the memory, or a quarter, at float32's speed on processors that don't
multiply such numbers themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.decoder.attention import AttentionMetadata, AttentionSpec, KVPool
from workers.decoder.int8 import quantized_in_bites
from workers.decoder.kernels import native
from workers.decoder.weight import ExpertBank, Weight

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
_CACHE_DTYPES = (torch.float32, torch.bfloat16)


class PackedWeight(Weight):
    """A matrix [out, in] in panels of output columns, see `native.pack`. `rows` gives float32."""

    def __init__(self, out_features: int, in_features: int, *, dtype: torch.dtype) -> None:
        self.shape = (out_features, in_features)
        self.dtype = dtype
        self.packed = _panels(out_features, in_features, dtype=dtype)
        self.scales = _scales(self.packed)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def put(self, first_row: int, matrix: Tensor) -> None:
        _put(self.packed, self.scales, first_row, matrix)

    def rows(self, ids: Tensor) -> Tensor:
        panel = self.packed.shape[-1]
        found = self.packed[ids // panel, :, ids % panel].float()
        return found if self.scales is None else found * self.scales[ids, None]

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] -> [T, out] in x's dtype."""
        return native.matmul(x, self.packed, self.shape[0], bias, self.scales).to(x.dtype)


class PackedBank(ExpertBank):
    """One packed matrix in each slot."""

    def __init__(self, experts: Sequence[int], out_features: int, in_features: int, *, dtype: torch.dtype) -> None:
        self.experts = tuple(experts)
        self.out_features = out_features
        self.in_features = in_features
        self.dtype = dtype
        self.packed = _panels(len(self.experts), out_features, in_features, dtype=dtype)
        self.scales = _scales(self.packed)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def put(self, slot: int, first_row: int, matrix: Tensor) -> None:
        _put(self.packed[slot], None if self.scales is None else self.scales[slot], first_row, matrix)

    def linear(self, x: Tensor, rows_per_slot: Sequence[int], bias: Tensor | None) -> Tensor:
        """x [T, in] sorted by slot -> [T, out] in x's dtype; bias [slots, out]."""
        out = native.grouped_matmul(x, self.packed, self.out_features, list(rows_per_slot), bias, self.scales)
        return out.to(x.dtype)


class PackedPool(KVPool):
    """Keys in panels, transposed, and values in rows, a head's part of a block together: see attention.c.

    Keys that hold the values lie in rows as well.
    """

    def __init__(self, spec: AttentionSpec, num_blocks: int, block_tokens: int, *, dtype: torch.dtype) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.dtype = dtype
        self.keys, self.values = native.new_pages(
            num_blocks,
            spec.num_kv_heads,
            block_tokens,
            spec.head_width,
            None if spec.values_in_keys else spec.value_width,
            dtype,
        )
        self._runs = native.head_runs(spec.reaches, spec.num_kv_heads)
        self._slopes = None if spec.alibi_slopes is None else torch.tensor(spec.alibi_slopes)

    @staticmethod
    def fits(spec: AttentionSpec, block_tokens: int, dtype: torch.dtype) -> bool:
        """Whether the kernel takes a cache of this shape."""
        widest = spec.value_width if spec.sparse is None else max(spec.value_width, spec.head_width)
        whole_panels = block_tokens % native.panel_keys() == 0
        return dtype in _CACHE_DTYPES and whole_panels and widest <= native.widest_value()

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + (0 if self.values is None else self.values.nbytes)

    def write(self, key: Tensor, value: Tensor | None, slots: Tensor) -> None:
        native.write_pages(self.keys, self.values, key, value, slots)

    def copy_blocks(self, sources: Tensor, targets: Tensor) -> None:
        self.keys[targets] = self.keys[sources]
        if self.values is not None:
            self.values[targets] = self.values[sources]

    def attend(self, query: Tensor, metadata: AttentionMetadata, sinks: Tensor | None) -> Tensor:
        """query [T, H, D] -> [T, H, Dv] in query's dtype."""
        return native.attention(
            query,
            self.keys,
            self.values,
            query_start=metadata.query_start,
            context_lens=metadata.context_lens,
            block_table=metadata.block_table,
            value_width=self.spec.value_width,
            scale=self.spec.scale,
            runs=self._runs,
            softcap=self.spec.softcap,
            slopes=self._slopes,
            sinks=sinks,
        ).to(query.dtype)


def _panels(*shape: int, dtype: torch.dtype) -> Tensor:
    """Room for matrices [..., out, in]. The last panel's columns beyond `out` are computed as well, so zeros."""
    *lead, rows, columns = shape
    panel = native.panel_columns()
    return torch.zeros(*lead, -(-rows // panel), columns, panel, dtype=dtype)


def _scales(packed: Tensor) -> Tensor | None:
    """Room for the scales of 8-bit panels [..., panels, in, P]: one an output column, [..., panels * P]."""
    if packed.dtype != torch.int8:
        return None
    *lead, panels, _, panel = packed.shape
    return torch.zeros(*lead, panels * panel)


def _put(packed: Tensor, scales: Tensor | None, first_row: int, matrix: Tensor) -> None:
    """Fill the rows from first_row on, quantized where there are scales to hold."""
    if scales is None:
        native.pack_rows(packed, first_row, matrix)
        return
    for rows, integers, scale in quantized_in_bites(matrix):
        native.pack_rows(packed, first_row + rows.start, integers)
        scales[first_row + rows.start : first_row + rows.stop] = scale
