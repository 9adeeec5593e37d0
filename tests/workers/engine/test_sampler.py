"""The sampler against transformers' logits processors, and its own promises."""

from __future__ import annotations

import time
from array import array
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from workers.engine.request import GenerateRequest, SamplingParams, VocabularyMask
from workers.engine.sampler import choose, draw, filtered, penalised
from workers.engine.sequence import Sequence

VOCABULARY = 997


def sequence(
    prompt: list[int], *, key: int = 0, sample: int = 0, mask: VocabularyMask | None = None, **params: Any
) -> Sequence:
    request = GenerateRequest(
        request_id=0, token_ids=prompt, params=SamplingParams(**params), key=key, vocabulary_mask=mask
    )
    return Sequence(
        request=request,
        order=(0, sample),
        tokens=array("q", prompt),
        num_prompt=len(prompt),
        max_tokens=10_000,
        tables=[],
        num_trimmed=[],
        reuses_prefix=True,
        takes_argmax=request.takes_argmax,
    )


def logits(rows: int, *, seed: int = 0, vocabulary: int = VOCABULARY, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def processors(params: SamplingParams) -> LogitsProcessorList:
    """What transformers' generate builds for these settings."""
    made = LogitsProcessorList()
    if params.repetition_penalty is not None:
        made.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    made.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        made.append(TopKLogitsWarper(params.top_k))
    if params.top_p is not None:
        made.append(TopPLogitsWarper(params.top_p))
    if params.min_p is not None:
        made.append(MinPLogitsWarper(params.min_p))
    return made


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.7, "top_k": 1},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 1.0, "top_k": 5000},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 1.0, "min_p": 0.02},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.7, "repetition_penalty": 0.8, "top_k": 100, "top_p": 0.8, "min_p": 0.01},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_it_keeps_the_tokens_that_transformers_keeps_with_their_probabilities(
    setting: dict[str, Any], seed: int
) -> None:
    params = SamplingParams(**setting)
    raw = logits(1, seed=seed)
    prompt = torch.randint(VOCABULARY, (1, 60), generator=torch.Generator().manual_seed(seed))
    theirs = torch.softmax(processors(params)(prompt, raw.clone()).double(), dim=-1)[0].numpy()

    scores = raw[0].numpy()
    if params.repetition_penalty is not None:
        scores = penalised(scores, prompt[0].numpy(), params.repetition_penalty)
    ids, weights = filtered(scores / np.float32(params.temperature), params)
    ours = np.zeros(VOCABULARY)
    ours[np.arange(VOCABULARY) if ids is None else ids] = weights / weights.sum(dtype=np.float64)

    assert np.flatnonzero(ours).tolist() == np.flatnonzero(theirs).tolist()
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-12)


def test_tokens_that_tie_with_the_kth_are_kept_as_transformers_does() -> None:
    ids, _ = filtered(np.array([1, 3, 2, 2, 0], dtype=np.float32), SamplingParams(temperature=1.0, top_k=2))
    assert ids is not None
    assert ids.tolist() == [1, 2, 3]


def test_draws_follow_the_distribution() -> None:
    raw = logits(1, vocabulary=20, spread=1.0)
    number = 5_000
    draws = [sequence([1], key=key, temperature=1.0, top_k=8) for key in range(number)]
    counts = np.bincount(choose(raw, draws, [0] * number).token_ids, minlength=20)
    expected = np.zeros(20)
    top = torch.topk(raw[0], 8)
    expected[top.indices] = torch.softmax(top.values, 0) * number
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum() < 24.3  # 7 degrees of freedom, p = 0.001


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 997])
def test_a_draw_over_the_whole_vocabulary_is_the_plain_inverse_of_the_cumulative_sum(vocabulary: int) -> None:
    weights = np.exp(logits(1, vocabulary=vocabulary)[0].numpy())
    weights[::3] = 0
    if vocabulary == 1:
        weights[:] = 1
    cumulative = np.cumsum(weights, dtype=np.float64)
    for u in [0.0, *np.random.default_rng(0).random(500), 1 - 2**-53]:
        token = draw(None, weights, u)
        assert weights[token] > 0
        assert cumulative[token] - weights[token] <= u * cumulative[-1] * (1 + 1e-12)
        assert u * cumulative[-1] <= cumulative[token] * (1 + 1e-12)


def test_a_rows_draw_does_not_depend_on_its_batch_mates() -> None:
    raw = logits(64)
    draws = [
        sequence([1, 2, 3, i], key=i, sample=i % 3, seed=5, logprobs=True, **SETTINGS[i % len(SETTINGS)])
        for i in range(64)
    ]
    together = choose(raw, draws, list(range(64)))
    for i in range(64):
        alone = choose(raw[i : i + 1], [draws[i]], [0])
        assert alone.token_ids == [together.token_ids[i]]
        assert alone.logprobs[0] == together.logprobs[i]


def test_seed_key_sample_and_position_each_change_the_draw() -> None:
    raw = logits(1)
    variants = [{"seed": 1}, {"key": 1}, {"sample": 1}, {"prompt": [1, 2]}]
    base: dict[str, Any] = {"prompt": [1], "temperature": 2.0}
    draws = [sequence(**(base | variant)) for variant in [{}, *variants]]
    assert len(set(choose(raw, draws, [0] * 5).token_ids)) == 5


def test_greedy_takes_the_first_of_equally_likely_tokens() -> None:
    raw = torch.zeros(2, 10)
    raw[0, [3, 7]] = 1
    assert choose(raw, [sequence([1]), sequence([1])], [0, 1]).token_ids == [3, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_fail_their_own_row_only(bad: float, temperature: float) -> None:
    raw = logits(3)
    expected = choose(raw, [sequence([1], temperature=temperature)] * 3, [0, 1, 2]).token_ids
    raw[1, 500] = bad
    choices = choose(raw, [sequence([1], temperature=temperature)] * 3, [0, 1, 2])
    assert {i: error.code for i, error in choices.errors.items()} == {1: "nonfinite"}
    assert [choices.token_ids[0], choices.token_ids[2]] == [expected[0], expected[2]]


def test_a_row_without_any_possible_token_is_not_finite() -> None:
    raw = torch.full((1, 5), -float("inf"))
    assert choose(raw, [sequence([1])], [0]).errors[0].code == "nonfinite"


def test_a_token_of_minus_infinity_is_just_impossible() -> None:
    raw = torch.zeros(1, 3)
    raw[0, 0] = -float("inf")
    draws = [sequence([1], key=key, temperature=1.0) for key in range(50)]
    assert set(choose(raw, draws, [0] * 50).token_ids) == {1, 2}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_vocabulary_mask_leaves_only_what_it_allows(temperature: float) -> None:
    raw = logits(1)
    allowed = np.zeros(VOCABULARY, dtype=bool)
    allowed[[10, 20]] = True
    draws = [sequence([1], key=key, temperature=temperature, mask=allowed) for key in range(40)]
    tokens = set(choose(raw, draws, [0] * 40).token_ids)
    assert tokens == ({10, 20} if temperature else {10 if raw[0, 10] > raw[0, 20] else 20})


def test_a_mask_may_depend_on_what_was_generated() -> None:
    def after(generated: Any) -> Any:
        allowed = np.zeros(VOCABULARY, dtype=bool)
        allowed[len(generated)] = True
        return allowed

    going_on = sequence([5, 6], mask=after)
    going_on.tokens.extend([7, 8, 9])
    assert choose(logits(1), [going_on], [0]).token_ids == [3]


@pytest.mark.parametrize("mask", [np.zeros(VOCABULARY, dtype=bool), np.ones(3, dtype=bool)], ids=["empty", "short"])
def test_a_mask_that_can_not_be_met_fails_its_row_only(mask: Any) -> None:
    choices = choose(logits(2), [sequence([1], mask=mask), sequence([1])], [0, 1])
    assert list(choices.errors) == [0]


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    raw = logits(2)
    params = {"temperature": 0.5, "top_k": 3, "repetition_penalty": 1.5, "logprobs": True}
    choices = choose(raw, [sequence([1, 2], **params), sequence([1], logprobs=True)], [0, 1])
    expected = torch.log_softmax(raw.double(), dim=-1)
    for i in (0, 1):
        assert choices.logprobs[i] == pytest.approx(float(expected[i, choices.token_ids[i]]), abs=1e-5)


def test_samples_may_draw_from_one_row() -> None:
    raw = logits(2)
    draws = [sequence([1], sample=sample, temperature=2.0) for sample in range(4)]
    assert choose(raw, draws, [1] * 4).token_ids == choose(raw[1:], draws, [0] * 4).token_ids


def test_a_greedy_batch_costs_about_its_argmax() -> None:
    raw = logits(64, vocabulary=49152)
    draws = [sequence([1, 2, 3]) for _ in range(64)]
    rows = list(range(64))

    def fastest(work: Any) -> float:
        times = []
        for _ in range(7):
            start = time.thread_time()  # so that a busy machine doesn't count
            work()
            times.append(time.thread_time() - start)
        return min(times)

    assert fastest(lambda: choose(raw, draws, rows)) < 3 * fastest(lambda: raw.numpy().argmax(-1)) + 0.001


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("max_new_tokens", 2.0),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", 1e-9),
        ("top_k", -1),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("stop", ["a", ""]),
        ("stop", [3]),
        ("stop_token_ids", [-1]),
        ("n", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", 1),
        ("ignore_eos", "no"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


def test_settings_are_frozen_hashable_and_take_lists() -> None:
    params = SamplingParams(stop=["a"], stop_token_ids=[1])
    assert hash(params) == hash(SamplingParams(stop="a", stop_token_ids=(1,)))
    with pytest.raises(AttributeError):
        params.n = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(3)  # type: ignore[misc]
