"""Which experts a token goes to, and what each one's answer weighs. T tokens, E experts, G groups, k chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.decoder import ops
from workers.decoder.config import RouterConfig


def choose_experts(logits: Tensor, config: RouterConfig, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> expert ids [T, k] int64, ascending in each row, and their weights [T, k] float32.

    correction [E] is the bias that a router with `correction_bias` adds for choosing. Ascending order makes the sum
    over a token's experts the same wherever they lie.
    """
    logits = logits.float()
    if config.scores == "sparsemixer":
        return _one_after_the_other(logits, config)
    if config.scores == "sigmoid":
        scores = ops.sigmoid(logits)
    elif config.scores == "softmax_all":
        scores = logits.softmax(dim=-1)
    else:
        scores = logits
    choice = scores if correction is None else scores + correction
    if config.groups > 1:
        choice = _within_best_groups(choice, config, two_best=correction is not None)
    ids = choice.topk(config.top_k, dim=-1).indices.sort(dim=-1).values  # [T, k]
    weights = scores.gather(1, ids)
    if config.scores == "softmax_chosen":
        weights = weights.softmax(dim=-1)
    if config.renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    return ids, weights * config.scale if config.scale != 1.0 else weights


def _within_best_groups(choice: Tensor, config: RouterConfig, *, two_best: bool) -> Tensor:
    """choice [T, E] with experts outside the token's best groups put out of reach."""
    grouped = choice.reshape(-1, config.groups, config.num_experts // config.groups)  # [T, G, E / G]
    standing = grouped.topk(2, dim=-1).values.sum(dim=-1) if two_best else grouped.amax(dim=-1)  # [T, G]
    best = standing.topk(config.top_groups, dim=-1).indices
    allowed = torch.zeros_like(standing, dtype=torch.bool).scatter_(1, best, True)
    return grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(1)


def _one_after_the_other(logits: Tensor, config: RouterConfig) -> tuple[Tensor, Tensor]:
    """SparseMixer-v2 as it infers (Liu et al. 2024, arXiv 2409.12136, section 2.1): as `choose_experts`."""
    left = logits
    chosen: list[Tensor] = []
    weighed: list[Tensor] = []
    for _ in range(config.top_k):
        largest, best = left.max(dim=-1, keepdim=True)  # [T, 1]
        distance = (largest - logits) / logits.abs().clamp(min=largest)  # [T, E]
        near = left.masked_fill(distance > 2 * config.tolerance, -torch.inf)
        chosen.append(best)
        weighed.append(near.softmax(dim=-1).gather(1, best))
        left = left.scatter(1, best, -torch.inf)
    ids, order = torch.cat(chosen, dim=-1).sort(dim=-1)
    return ids, torch.cat(weighed, dim=-1).gather(1, order)
