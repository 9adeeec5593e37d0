"""Weights as 8-bit integers: each row of a matrix over its own scale, symmetric around zero. Here in plain torch.

A row w is held as q = round(w / s) with s = max|w| / 127, so that w is q * s with an error of at most s / 2; a product
is computed as (x . q) * s in the activations' own format. kernels/packed.py has the variant for the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.decoder.weight import ExpertBank, Weight

_LARGEST = 127.0
_ROWS_AT_ONCE = 256  # of those that are quantized, so that passing tensors stay small beside the matrix


def quantized(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """matrix [n, in] -> integers [n, in] int8 and a scale a row [n] float32.

    A row of zeros has the scale 0. A row with an infinity or a not-a-number has one for its scale, so that it stays as
    visible in the answers as it was.

    >>> quantized(torch.tensor([[0.5, -1.27, 0.004], [0.0, 0.0, 0.0]]))
    (tensor([[  50, -127,    0],
            [   0,    0,    0]], dtype=torch.int8), tensor([0.0100, 0.0000]))
    """
    integers = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    scales = torch.empty(matrix.shape[0], dtype=torch.float32, device=matrix.device)
    for first in range(0, matrix.shape[0], _ROWS_AT_ONCE):
        rows = matrix[first : first + _ROWS_AT_ONCE].float()
        scale = rows.abs().amax(dim=1) / _LARGEST
        scales[first : first + _ROWS_AT_ONCE] = scale
        divisor = torch.where(scale > 0, scale, 1.0)[:, None]
        integers[first : first + _ROWS_AT_ONCE] = (rows / divisor).round().nan_to_num_(0.0).clamp_(-_LARGEST, _LARGEST)
    return integers, scales


class Int8Weight(Weight):
    """Integers [out, in] and scales [out]. `rows` gives float32."""

    dtype = torch.int8

    def __init__(self, out_features: int, in_features: int, *, device: torch.device | str = "cpu") -> None:
        self.shape = (out_features, in_features)
        self.integers = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.scales = torch.zeros(out_features, device=device)

    @property
    def nbytes(self) -> int:
        return self.integers.nbytes + self.scales.nbytes

    def put(self, first_row: int, matrix: Tensor) -> None:
        integers, scales = quantized(matrix)
        self.integers[first_row : first_row + matrix.shape[0]] = integers
        self.scales[first_row : first_row + matrix.shape[0]] = scales

    def rows(self, ids: Tensor) -> Tensor:
        return self.integers[ids].float() * self.scales[ids, None]

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] -> [T, out] in x's dtype."""
        return _product(x, self.integers, self.scales, bias)


class Int8Bank(ExpertBank):
    """Integers [slots, out, in] and scales [slots, out]."""

    dtype = torch.int8

    def __init__(
        self, experts: Sequence[int], out_features: int, in_features: int, *, device: torch.device | str = "cpu"
    ) -> None:
        self.experts = tuple(experts)
        self.out_features = out_features
        self.in_features = in_features
        self.integers = torch.zeros(len(self.experts), out_features, in_features, dtype=torch.int8, device=device)
        self.scales = torch.zeros(len(self.experts), out_features, device=device)

    @property
    def nbytes(self) -> int:
        return self.integers.nbytes + self.scales.nbytes

    def put(self, slot: int, first_row: int, matrix: Tensor) -> None:
        integers, scales = quantized(matrix)
        self.integers[slot, first_row : first_row + matrix.shape[0]] = integers
        self.scales[slot, first_row : first_row + matrix.shape[0]] = scales

    def linear(self, x: Tensor, slot: int, bias: Tensor | None) -> Tensor:
        """x [n, in] times one slot's matrix -> [n, out] in x's dtype."""
        return _product(x, self.integers[slot], self.scales[slot], bias)


def _product(x: Tensor, integers: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Integers to 127 are exact in float32 and in bfloat16; they are widened for the one product."""
    out = F.linear(x, integers.to(x.dtype)).float() * scales
    return (out if bias is None else out + bias.float()).to(x.dtype)
