"""MXFP4 (OCP Microscaling Formats, version 1.0) as gpt-oss publishes it: blocks of 32 numbers of 4 bits and a scale.

A number is a sign, two bits of exponent and one of mantissa; two lie in a byte, the first in its lower half. A scale is
a power of two, stored as its exponent plus 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32  # numbers under one scale
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor((*_MAGNITUDES, *(-value for value in _MAGNITUDES)))


def widen(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks [..., G, 16] uint8, scales [..., G] uint8 -> [..., G * 32] in `dtype`.

    Exact in float32 and bfloat16, within what they can hold: 1.5 is the largest mantissa and 2^127 the largest scale.
    """
    assert blocks.dtype == scales.dtype == torch.uint8, (blocks.dtype, scales.dtype)
    values = _VALUES.to(dtype)
    wide = torch.empty(*blocks.shape, 2, dtype=dtype)  # [..., G, 16, 2]
    wide[..., 0] = values[(blocks & 15).int()]
    wide[..., 1] = values[(blocks >> 4).int()]
    exponents = scales.int() - 127
    return torch.ldexp(wide, exponents[..., None, None]).to(dtype).flatten(-3)
