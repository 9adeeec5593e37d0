"""Weights as 8-bit integers: each row of a matrix over its own scale, symmetric around zero. Here in plain torch.

A row w is held as q = round(w / s) with s = max|w| / 127, so that w is q * s with an error of at most s / 2; a product
is computed as (x . q) * s in the activations' own format. kernels/packed.py has the variant for the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.decoder.weight import ExpertBank, Weight

_LARGEST = 127.0
_ROWS_AT_ONCE = 256


def quantized(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """matrix [n, in] -> integers [n, in] int8 and a scale a row [n] float32.

    A row of zeros has the scale 0. A row with an infinity or a not-a-number has one for its scale, so that it stays as
    visible in the answers as it was.

    >>> quantized(torch.tensor([[0.5, -1.27, 0.004], [0.0, 0.0, 0.0]]))
    (tensor([[  50, -127,    0],
            [   0,    0,    0]], dtype=torch.int8), tensor([0.0100, 0.0000]))
    """
    wide = matrix.float()
    scales = wide.abs().amax(dim=1) / _LARGEST
    divisors = torch.where(scales > 0, scales, 1.0)[:, None]
    return (wide / divisors).round_().nan_to_num_(0.0).clamp_(-_LARGEST, _LARGEST).to(torch.int8), scales


def quantized_in_bites(matrix: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """As `quantized`, some rows at a time and which: what passes is small beside the matrix."""
    for first in range(0, matrix.shape[0], _ROWS_AT_ONCE):
        rows = slice(first, min(first + _ROWS_AT_ONCE, matrix.shape[0]))
        yield rows, *quantized(matrix[rows])


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
        _put(self.integers, self.scales, first_row, matrix)

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
        _put(self.integers[slot], self.scales[slot], first_row, matrix)

    def linear(self, x: Tensor, slot: int, bias: Tensor | None) -> Tensor:
        """x [n, in] times one slot's matrix -> [n, out] in x's dtype."""
        return _product(x, self.integers[slot], self.scales[slot], bias)


def _put(integers: Tensor, scales: Tensor, first_row: int, matrix: Tensor) -> None:
    into_integers, into_scales = integers[first_row:], scales[first_row:]
    for rows, narrow, scale in quantized_in_bites(matrix):
        into_integers[rows], into_scales[rows] = narrow, scale


def _product(x: Tensor, integers: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Integers to 127 are exact in float32 and in bfloat16; they are widened for the one product."""
    out = F.linear(x, integers.to(x.dtype)).float() * scales
    return (out if bias is None else out + bias.float()).to(x.dtype)
