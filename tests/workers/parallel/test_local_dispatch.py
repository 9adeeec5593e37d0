"""Tokens reach the experts they chose, and their answers come back weighed, whatever else is in the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.parallel.dispatch import LocalDispatcher

SCALES = torch.tensor([1.0, -2.0, 0.5, 3.0, 7.0])  # expert e multiplies by SCALES[e]


def compute(x: Tensor, rows_per_slot: Tensor) -> Tensor:
    assert int(rows_per_slot.sum()) == x.shape[0]
    return x * SCALES.repeat_interleave(rows_per_slot)[:, None]


def test_each_token_gets_the_weighed_sum_of_its_own_experts() -> None:
    x = torch.randn(6, 3)
    ids = torch.tensor([[0, 3], [1, 2], [0, 4], [3, 4], [0, 1], [1, 2]])
    weights = torch.rand(6, 2)
    got = LocalDispatcher().run(0, 5, x, ids, weights, compute)
    torch.testing.assert_close(got, x * (SCALES[ids] * weights).sum(1, keepdim=True))


def test_a_token_gets_the_same_bits_alone_and_beside_others() -> None:
    x, weights = torch.randn(50, 8), torch.rand(50, 3)
    ids = torch.stack([torch.randperm(5)[:3].sort().values for _ in range(50)])
    together = LocalDispatcher().run(0, 5, x, ids, weights, compute)
    order = torch.randperm(50)
    shuffled = LocalDispatcher().run(0, 5, x[order], ids[order], weights[order], compute)
    assert torch.equal(shuffled, together[order])
    for t in range(50):
        alone = LocalDispatcher().run(0, 5, x[t : t + 1], ids[t : t + 1], weights[t : t + 1], compute)
        assert torch.equal(alone[0], together[t])


def test_no_tokens_are_dispatched_without_complaint() -> None:
    got = LocalDispatcher().run(0, 5, torch.empty(0, 8), torch.empty(0, 2).long(), torch.empty(0, 2), compute)
    assert got.shape == (0, 8)
