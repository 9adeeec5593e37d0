"""Routers of every published kind against the choice written out a token at a time."""

from __future__ import annotations

import pytest
import torch

from workers.decoder.config import RouterConfig
from workers.decoder.router import choose_experts

KINDS = {
    "Mixtral": RouterConfig(num_experts=5, top_k=2, renormalise=True),
    "Qwen2-MoE": RouterConfig(num_experts=5, top_k=3),
    "gpt-oss": RouterConfig(num_experts=5, top_k=2, scores="softmax_chosen"),
    "DeepSeek-V2": RouterConfig(num_experts=12, top_k=3, groups=4, top_groups=2, scale=16.0),
    "DeepSeek-V3": RouterConfig(
        num_experts=12, top_k=3, groups=3, top_groups=2, scores="sigmoid", renormalise=True, scale=2.5,
        correction_bias=True,
    ),
}  # fmt: skip


def chosen_by_hand(logits: list[float], config: RouterConfig, correction: list[float] | None) -> dict[int, float]:
    """expert -> weight of one token, in float64."""
    values = torch.tensor(logits, dtype=torch.float64)
    scores = {"sigmoid": values.sigmoid(), "softmax_all": values.softmax(0), "softmax_chosen": values}[config.scores]
    wanted = [float(s) + (correction[e] if correction else 0.0) for e, s in enumerate(scores)]
    size = config.num_experts // config.groups
    groups = [sorted(wanted[g * size : (g + 1) * size], reverse=True) for g in range(config.groups)]
    standing = [sum(group[:2]) if correction else group[0] for group in groups]
    best = sorted(range(config.groups), key=lambda g: -standing[g])[: config.top_groups]
    allowed = [e for e in range(config.num_experts) if e // size in best]
    chosen = sorted(sorted(allowed, key=lambda e: -wanted[e])[: config.top_k])
    weights = scores[chosen]
    if config.scores == "softmax_chosen":
        weights = weights.softmax(0)
    if config.renormalise:
        weights = weights / weights.sum()
    return {e: float(w) * config.scale for e, w in zip(chosen, weights, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_chooses_and_weighs_as_published(kind: str) -> None:
    config = KINDS[kind]
    torch.manual_seed(0)
    logits = torch.randn(40, config.num_experts) * 2
    correction = torch.randn(config.num_experts) if config.correction_bias else None
    ids, weights = choose_experts(logits, config, correction)
    assert weights.dtype == torch.float32
    for t in range(40):
        by_hand = chosen_by_hand(logits[t].tolist(), config, None if correction is None else correction.tolist())
        assert ids[t].tolist() == list(by_hand)  # ascending
        torch.testing.assert_close(weights[t], torch.tensor(list(by_hand.values())), rtol=1e-5, atol=1e-6)


def test_a_correction_changes_who_is_chosen_but_not_what_they_weigh() -> None:
    config = RouterConfig(num_experts=4, top_k=1, scores="sigmoid", correction_bias=True)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    ids, weights = choose_experts(logits, config, torch.tensor([0.0, 0.0, 0.0, 9.0]))
    assert ids.item() == 3
    torch.testing.assert_close(weights, logits[:, 3:].sigmoid())


def test_no_tokens_choose_nothing() -> None:
    ids, weights = choose_experts(torch.empty(0, 12), KINDS["DeepSeek-V2"])
    assert ids.shape == weights.shape == (0, 3)


@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"top_k": 6}, {"groups": 2}, {"groups": 5, "top_groups": 6}])
def test_a_choice_that_can_not_be_made_is_refused(wrong: dict[str, int]) -> None:
    settings: dict[str, int] = {"num_experts": 5, "top_k": 2, **wrong}
    with pytest.raises(ValueError):
        RouterConfig(**settings)  # type: ignore[arg-type]
