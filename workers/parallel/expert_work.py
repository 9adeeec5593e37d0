"""What one rank's experts have computed so far: plain numbers that travel. Pure.

E experts of a layer, R ranks, S slots of one rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWork:
    """`rows[layer]` [E] int64: rows that this rank computed for each expert, its own tokens' and other ranks'.

    `bytes_to` [R]: hidden states that left for each rank, to its experts and as answers to its tokens; () of a rank
    that is alone. `row_bytes` is one hidden state; 0 before the first.
    """

    rows: Mapping[int, NDArray[np.int64]]
    bytes_to: tuple[int, ...] = ()
    row_bytes: int = 0


def by_expert(rows: NDArray[np.int64], held: Sequence[int], num_experts: int) -> NDArray[np.int64]:
    """rows [S] computed in each slot, held [S] the expert of each -> [E]."""
    found = np.zeros(num_experts, dtype=np.int64)
    found[list(held)] = rows  # a rank holds an expert once
    return found
