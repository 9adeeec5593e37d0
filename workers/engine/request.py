"""What is asked of an engine and what it answers: plain data, checked once where it enters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.embedding import VectorForm
from pipeline.errors import RowError

LOWEST_TEMPERATURE = 1e-5  # below it logits / temperature leaves float32's useful range

# bool [V], True where a token may come next: the same at every position, or a function of the tokens generated so far.
# A function is asked again after a preemption, so it must not keep count itself.
VocabularyMask = npt.NDArray[np.bool_] | Callable[[Sequence[int]], npt.NDArray[np.bool_]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a request's tokens are chosen and when they end. Raises ValueError naming the field that is wrong.

    `temperature` 0 takes the likeliest token. A filter that is None (or top_k 0, top_p 1, min_p 0, repetition_penalty
    1) is off. Filters work as transformers' logits processors do, in the order repetition_penalty, temperature, top_k,
    top_p, min_p. `stop` strings end the text where they begin, wherever token borders fall; `stop_token_ids` and,
    unless `ignore_eos`, the model's end-of-text tokens end it before themselves. `max_new_tokens` counts the ending
    token. `n` samples share one computation of the prompt. `logprobs` asks for those of the chosen tokens before
    temperature and filters. A draw is a function of `seed`, the request's key, sample and position, and of its logits.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] | list[str] | str = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    n: int = 1
    seed: int = 0
    logprobs: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check_integer("max_new_tokens", self.max_new_tokens, least=1)
        _check_integer("n", self.n, least=1)
        _check_integer("seed", self.seed, least=0, most=2**64 - 1)
        _check_number("temperature", self.temperature, least=0.0)
        if 0 < self.temperature < LOWEST_TEMPERATURE:
            raise ValueError(f"temperature must be 0 (greedy) or at least {LOWEST_TEMPERATURE}, got {self.temperature}")
        if self.top_k is not None:
            _check_integer("top_k", self.top_k, least=0)
        if self.top_p is not None:
            _check_number("top_p", self.top_p, least=0.0, most=1.0)
        if self.min_p is not None:
            _check_number("min_p", self.min_p, least=0.0, most=1.0)
        if self.repetition_penalty is not None:
            _check_number("repetition_penalty", self.repetition_penalty, least=0.0)
            if self.repetition_penalty == 0:
                raise ValueError("repetition_penalty must be greater than 0 (1 or None: off), got 0")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop must hold non-empty strings, got {text!r}")
        for token in self.stop_token_ids:
            _check_integer("stop_token_ids", token, least=0)
        for name, flag in (("logprobs", self.logprobs), ("ignore_eos", self.ignore_eos)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} must be true or false, got {flag!r}")

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty is not None and self.repetition_penalty != 1.0


def _check_integer(name: str, value: object, *, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < least or (most is not None and value > most):
        raise ValueError(
            f"{name} must be at least {least}{'' if most is None else f' and at most {most}'}, got {value}"
        )


def _check_number(name: str, value: object, *, least: float, most: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if value < least or (most is not None and value > most):
        raise ValueError(
            f"{name} must be at least {least}{'' if most is None else f' and at most {most}'}, got {value}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorRequest:
    """A vector of a request's prompt, pooled from its token `pooled_from` on."""

    form: VectorForm
    pooled_from: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Continue `token_ids`. `request_id` is the caller's, unique among what the engine holds.

    `key` (0 to 2**64 - 1) tells this request's random numbers from others': in a job, the row number. `vector`: of the
    prompt, too, from the same pass; it comes with sample 0.
    """

    request_id: int
    token_ids: Sequence[int]
    params: SamplingParams
    key: int = 0
    vocabulary_mask: VocabularyMask | None = None
    vector: VectorRequest | None = None

    def __post_init__(self) -> None:
        _check_integer("key", self.key, least=0, most=2**64 - 1)

    @property
    def takes_argmax(self) -> bool:
        """Whether the token with the greatest logit is all that is asked."""
        params = self.params
        return not (params.temperature or params.penalises or params.logprobs or self.vocabulary_mask is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """Pool the hidden states of `token_ids` after the final norm into one vector of unit length."""

    request_id: int
    token_ids: Sequence[int]
    vector: VectorRequest = field(default_factory=lambda: VectorRequest(form=VectorForm()))


Request = GenerateRequest | EmbedRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """One sample that came to its end, or the failure of its whole request.

    A request's samples are reported in one step, in the order of `sample`; a request that failed has one Finished,
    sample 0, with `error` set and the rest empty. `token_ids` (and `logprobs`, one each) leave out the token that ended
    the text; `text` leaves out the stop string and is None when the engine has no tokenizer. `finish_reason` is "stop"
    or "length" for a generation, else None. `vector`, where one was asked for, is float32 of unit length, of the width
    that its form says.
    """

    request_id: int
    sample: int = 0
    token_ids: list[int]
    text: str | None = None
    finish_reason: str | None = None
    logprobs: list[float] | None = None
    prompt_tokens: int
    vector: npt.NDArray[np.float32] | None = None
    error: RowError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One sample of one prompt, as `Engine.generate` returns it; the fields are those of Finished.

    A prompt that could not be served has one Output, sample 0, whose `error` says why.
    """

    prompt_index: int
    sample: int
    token_ids: list[int]
    text: str | None
    finish_reason: str | None
    logprobs: list[float] | None
    prompt_tokens: int
    error: RowError | None
