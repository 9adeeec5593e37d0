from __future__ import annotations

import pytest
import torch

from workers.decoder.pooling import Pool


def whole(pooling: str, states: torch.Tensor) -> torch.Tensor:
    """The definition, over all positions at once."""
    weights = {
        "mean": torch.ones(len(states)),
        "last": torch.eye(len(states))[-1],
        "weighted_mean": torch.arange(1, len(states) + 1),
    }[pooling].double()
    return (weights @ states.double() / weights.sum()).float()


@pytest.mark.parametrize("pooling", ["mean", "last", "weighted_mean"])
@pytest.mark.parametrize("chunks", [[9], [1, 8], [4, 4, 1], [1] * 9])
def test_where_chunks_end_makes_no_difference(pooling: str, chunks: list[int]) -> None:
    states = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    pool, start = Pool(pooling), 0
    for chunk in states.split(chunks):
        pool.add(chunk, start)
        start += len(chunk)
    torch.testing.assert_close(pool.vector(), whole(pooling, states), atol=1e-7, rtol=0)
