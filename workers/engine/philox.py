"""Random numbers as a function: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64s = npt.NDArray[np.uint64]

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10


def philox4x32(counter: tuple[UInt64s, UInt64s, UInt64s, UInt64s], key: tuple[UInt64s, UInt64s]) -> tuple[UInt64s, ...]:
    """Four 32-bit words [N] for each counter and key, all held in uint64 [N]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniform(seed: UInt64s, key: UInt64s, sample: UInt64s, position: UInt64s) -> npt.NDArray[np.float64]:
    """u [N] in [0, 1) with 53 random bits, each a function of its own (seed, key, sample, position) alone.

    seed and key are 64 bits wide, sample and position 32. The seed is Philox's key, the rest its counter.
    """
    counter = position & _LOW, sample & _LOW, key & _LOW, key >> _SHIFT
    high, low, _, _ = philox4x32(counter, (seed & _LOW, seed >> _SHIFT))
    bits = ((high >> np.uint64(5)) << np.uint64(26)) | (low >> np.uint64(6))
    return bits.astype(np.float64) / 2.0**53
