"""From logits to tokens.

V is the vocabulary, N the number of tokens to choose. A greedy batch costs its argmax and nothing else. Other rows are
worked one after the other: a row of V floats stays in the processor's cache, while passes over [N, V] run at the speed
of memory (torch's softmax alone of 256 x 49152 takes as long as all of this). It also makes a row's draw the same
whoever its batch-mates are: u is a function of the row's own seed, key, sample and position, and the cumulative sum
runs over the kept tokens in the order of their ids.

Filters follow transformers' logits processors (RepetitionPenalty, Temperature, TopK, TopP, MinP, in this order), which
tests compare with; like them, top_k keeps all tokens that tie with the k-th.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import RowError
from workers.engine.philox import uniform
from workers.engine.request import GenerateRequest, SamplingParams, VocabularyMask
from workers.engine.sequence import Sequence

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_NUCLEUS_FLOORS = 1e-3, 1e-5  # of the likeliest token's weight
_LANES = 64  # tokens summed together on the way to a cumulative sum over a whole vocabulary


@dataclass(slots=True, kw_only=True)
class Choices:
    """Each draw's token; by index, the logprobs asked for and the errors (the token of such a draw means nothing)."""

    token_ids: list[int]
    logprobs: dict[int, float] = field(default_factory=dict)
    errors: dict[int, RowError] = field(default_factory=dict)


def choose(logits: torch.Tensor, draws: list[Sequence], rows: list[int]) -> Choices:
    """Choose the next token of `draws[i]` from `logits[rows[i]]`; logits float32 [rows, V], left unchanged."""
    best, highest = _argmax(logits)
    choices = Choices(token_ids=best[rows].tolist())
    finite = np.isfinite(highest)  # NaN and inf both come out as the maximum
    if not finite.all():
        for i, row in enumerate(rows):
            if not finite[row]:
                choices.errors[i] = RowError("nonfinite", "the model's logits are not finite numbers")
    special = [i for i, sequence in enumerate(draws) if not sequence.takes_argmax and i not in choices.errors]
    if special:
        _choose_one_by_one(logits, draws, rows, special, choices)
    return choices


def _argmax(logits: torch.Tensor) -> tuple[npt.NDArray[np.int64], Floats]:
    """The first index of each row's maximum, and the maximum; NaN counts as greatest."""
    if logits.device.type == "cpu":
        array = logits.numpy()
        best = array.argmax(axis=-1)  # a tenth of the time of torch's
        return best, array[np.arange(len(best)), best]
    indices = logits.argmax(dim=-1, keepdim=True)
    return indices[:, 0].cpu().numpy(), logits.gather(1, indices)[:, 0].cpu().numpy()


def _params(sequence: Sequence) -> SamplingParams:
    assert isinstance(sequence.request, GenerateRequest)
    return sequence.request.params


def _choose_one_by_one(
    logits: torch.Tensor, draws: list[Sequence], rows: list[int], special: list[int], choices: Choices
) -> None:
    needed = sorted({rows[i] for i in special})
    if logits.device.type == "cpu":
        taken = {row: logits[row].numpy() for row in needed}
    else:
        taken = dict(zip(needed, logits[needed].cpu().numpy(), strict=True))
    numbers = _uniform(draws, [i for i in special if _params(draws[i]).temperature > 0])
    for i in special:
        sequence, row = draws[i], taken[rows[i]]
        params, request = _params(sequence), sequence.request
        assert isinstance(request, GenerateRequest)
        scores = row
        if params.penalises:
            assert params.repetition_penalty is not None
            scores = penalised(scores, np.array(sequence.tokens, dtype=np.int64), params.repetition_penalty)
        if request.vocabulary_mask is not None:
            allowed = _allowed(request.vocabulary_mask, sequence, len(row))
            if isinstance(allowed, RowError):
                choices.errors[i] = allowed
                continue
            scores = np.where(allowed, scores, np.float32(-np.inf))
        if params.temperature == 0:
            token = int(scores.argmax())
        else:
            kept, weights = filtered(np.divide(scores, np.float32(params.temperature), dtype=np.float32), params)
            token = draw(kept, weights, numbers[i])
        choices.token_ids[i] = token
        if params.logprobs:
            choices.logprobs[i] = _logprob(row, token)


def _uniform(draws: list[Sequence], indices: list[int]) -> dict[int, float]:
    if not indices:
        return {}
    keys = [draws[i].request.key for i in indices]  # type: ignore[union-attr]
    numbers = uniform(
        np.array([_params(draws[i]).seed for i in indices], dtype=np.uint64),
        np.array(keys, dtype=np.uint64),
        np.array([draws[i].sample for i in indices], dtype=np.uint64),
        np.array([len(draws[i].tokens) for i in indices], dtype=np.uint64),
    )
    return dict(zip(indices, numbers.tolist(), strict=True))


def _allowed(mask: VocabularyMask, sequence: Sequence, vocabulary: int) -> npt.NDArray[np.bool_] | RowError:
    allowed = mask if isinstance(mask, np.ndarray) else mask(sequence.generated)
    if allowed.shape != (vocabulary,):
        return RowError("internal", f"the vocabulary mask has shape {allowed.shape}, the logits have ({vocabulary},)")
    if not allowed.any():
        return RowError("internal", "the vocabulary mask allows no token")
    return allowed


def penalised(scores: Floats, seen: Ids, penalty: float) -> Floats:
    """Scores [V] with those of the tokens `seen` (prompt and generated, repeats count once) made less likely."""
    scores = scores.copy()
    picked = scores[seen]
    scores[seen] = np.where(picked < 0, picked * np.float32(penalty), picked / np.float32(penalty))
    return scores


def filtered(scores: Floats, params: SamplingParams) -> tuple[Ids | None, Floats]:
    """The ids that top_k, top_p and min_p keep, ascending (None: all), and their weights, the greatest being 1.

    `scores` [V] are logits after repetition penalty and temperature.
    """
    ids: Ids | None = None
    if params.top_k and params.top_k < len(scores):
        kth = np.partition(scores, len(scores) - params.top_k)[len(scores) - params.top_k]
        ids = np.flatnonzero(scores >= kth)
        scores = scores[ids]
    weights = scores - scores.max()
    np.exp(weights, out=weights)
    if params.top_p is not None and params.top_p < 1:
        kept = _nucleus(weights, params.top_p)
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    if params.min_p:
        kept = np.flatnonzero(weights >= np.float32(params.min_p))
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    return ids, weights


def _nucleus(weights: Floats, top_p: float) -> Ids:
    """The fewest likeliest tokens that together weigh at least `top_p` of all, at least one; ascending."""
    total = float(weights.sum(dtype=np.float64))
    # Ranking is what costs. It is enough to rank the tokens above some weight if these already weigh top_p, as they do
    # with the last floor: what lies below it weighs less than (1 - top_p) of all together.
    for floor in (*_NUCLEUS_FLOORS, (1 - top_p) * total / len(weights)):
        likely = np.flatnonzero(weights >= floor)
        if weights[likely].sum(dtype=np.float64) >= top_p * total:
            break
    ranked = likely[np.argsort(-weights[likely], kind="stable")]  # of equals the lower id first
    above = np.cumsum(weights[ranked], dtype=np.float64) - weights[ranked]  # what is likelier weighs this much
    return np.sort(ranked[: max(1, int(np.count_nonzero(above < top_p * total)))])


def draw(ids: Ids | None, weights: Floats, u: float) -> int:
    """The token at which the cumulative sum of `weights` passes u of their total. A weight of 0 is never drawn."""
    if ids is not None:
        return int(ids[_passes(weights, u)])
    # Over a whole vocabulary: sums of short runs first, then the run that u falls into.
    whole = len(weights) // _LANES * _LANES
    runs = weights[:whole].reshape(-1, _LANES).sum(axis=1, dtype=np.float64)
    if whole < len(weights):
        runs = np.append(runs, weights[whole:].sum(dtype=np.float64))
    cumulative = np.cumsum(runs)
    target = u * cumulative[-1]
    run = min(int(np.searchsorted(cumulative, target, side="right")), int(np.searchsorted(cumulative, cumulative[-1])))
    before = cumulative[run - 1] if run else 0.0
    return run * _LANES + _passes(weights[run * _LANES : (run + 1) * _LANES], (target - before) / runs[run])


def _passes(weights: Floats, u: float) -> int:
    cumulative = np.cumsum(weights, dtype=np.float64)
    total = cumulative[-1]
    # u * total may round up to total: then the last token that weighs anything.
    return min(int(np.searchsorted(cumulative, u * total, side="right")), int(np.searchsorted(cumulative, total)))


def _logprob(logits: Floats, token: int) -> float:
    highest = logits.max()
    return float(logits[token] - highest) - float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))
