"""How a token's hidden state reaches the experts it chose and what they answer is put together again.

T tokens, C model width, k experts a token, N = T * k pairs of token and expert.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from workers.parallel.expert_work import ExpertWork

# Takes rows [N, C] sorted by slot and how many there are for each slot, [slots] int64; gives each row's answer [N, C].
Compute = Callable[[Tensor, Tensor], Tensor]


class Dispatcher(ABC):
    """The seam between expert arithmetic and communication: neither sees the other."""

    @abstractmethod
    def run(
        self, layer: int, num_experts: int, x: Tensor, expert_ids: Tensor, weights: Tensor, compute: Compute
    ) -> Tensor:
        """x [T, C], expert_ids [T, k] int64, ascending in each row, weights [T, k] float32 -> [T, C].

        Row t of the result is the sum over i, in ascending order, of weights[t, i] times expert_ids[t, i]'s answer to
        x[t]. Neither the other tokens nor where an expert lies changes it. T may be 0.
        """

    @abstractmethod
    def work(self) -> ExpertWork:
        """What the experts here did so far. May be asked from any thread."""

    @abstractmethod
    def clear(self) -> None:
        """`work` tells of what comes from here on."""


class LocalDispatcher(Dispatcher):
    """All experts are here, expert e in slot e."""

    def __init__(self) -> None:
        self._rows: dict[int, Tensor] = {}  # by layer, [E]; replaced and never changed, for another thread may read

    def run(
        self, layer: int, num_experts: int, x: Tensor, expert_ids: Tensor, weights: Tensor, compute: Compute
    ) -> Tensor:
        top_k = expert_ids.shape[1]
        by_expert = expert_ids.flatten().argsort(stable=True)  # [N] pairs, those of a slot together
        rows_per_slot = expert_ids.flatten().bincount(minlength=num_experts)
        self._rows[layer] = self._rows[layer] + rows_per_slot if layer in self._rows else rows_per_slot
        answers = torch.empty(by_expert.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
        answers[by_expert] = compute(x[by_expert // top_k], rows_per_slot)
        return combine(answers, weights)

    def work(self) -> ExpertWork:
        return ExpertWork(rows={layer: rows.cpu().numpy() for layer, rows in sorted(self._rows.copy().items())})

    def clear(self) -> None:
        self._rows = {}


def combine(answers: Tensor, weights: Tensor) -> Tensor:
    """answers [T * k, C] in the order of pairs, weights [T, k] -> [T, C]: each token's sum, from its first pair on."""
    tokens, top_k = weights.shape
    answers = answers.view(tokens, top_k, answers.shape[1])
    weights = weights.to(answers.dtype)
    total = answers[:, 0] * weights[:, 0, None]
    for i in range(1, top_k):
        total = total + answers[:, i] * weights[:, i, None]
    return total
