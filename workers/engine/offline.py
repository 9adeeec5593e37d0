"""A whole list of prompts through an engine: what `Engine.generate` and `Engine.embed` do.

Prompts are tokenized a few hundred at a time and added a little ahead of what runs, so that the engine's own structures
stay small however many there are.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.embedding import EmbeddedText, TextEncoder, TextForm, VectorForm
from pipeline.errors import RowError
from pipeline.prompts import Prompt as PromptText
from workers.engine.request import (
    EmbedRequest,
    Finished,
    GenerateRequest,
    Output,
    Request,
    SamplingParams,
    VectorRequest,
)

if TYPE_CHECKING:
    from workers.engine.engine import Engine

Prompt = str | Sequence[int]
Tokens = list[int] | RowError

_TOKENIZED_TOGETHER = 512
_MOST_WAITING = 512  # added ahead of what runs


def generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    keys: Sequence[int] | None,
) -> list[Output]:
    _check_prompts(engine, prompts)
    each = (
        [params or SamplingParams()] * len(prompts) if params is None or isinstance(params, SamplingParams) else params
    )
    for name, given in (("params", each), ("keys", keys)):
        if given is not None and len(given) != len(prompts):
            raise ValueError(f"{len(given)} {name} for {len(prompts)} prompts; give one for each")
    for distinct in {params} if isinstance(params, SamplingParams) else set(each):
        engine.check(distinct)  # before a long call begins, not in the middle of it
    own_keys = _Keys()

    def requests() -> Iterator[tuple[int, Request | RowError]]:
        for index, tokens in _tokenized(engine, prompts):
            if isinstance(tokens, RowError):
                yield index, tokens
                continue
            key = own_keys.next(tokens) if keys is None else keys[index]
            yield index, GenerateRequest(request_id=index, token_ids=tokens, params=each[index], key=key)

    outputs: list[list[Output]] = [[] for _ in prompts]
    for finished in _run(engine, requests()):
        outputs[finished.request_id].append(
            Output(
                prompt_index=finished.request_id,
                sample=finished.sample,
                token_ids=finished.token_ids,
                text=finished.text,
                finish_reason=finished.finish_reason,
                logprobs=finished.logprobs,
                prompt_tokens=finished.prompt_tokens,
                error=finished.error,
            )
        )
    return [output for samples in outputs for output in samples]


def embed(
    engine: Engine, texts: Sequence[Prompt | EmbeddedText], form: VectorForm, text_form: TextForm
) -> npt.NDArray[np.float32]:
    _check_prompts(engine, texts)
    width = form.width(engine.decoder.hidden_width, engine.decoder.router_width)
    vectors = np.zeros((len(texts), width), dtype=np.float32)
    failed: dict[int, RowError] = {}

    def requests() -> Iterator[tuple[int, Request | RowError]]:
        for index, tokens in _encoded(engine, texts, text_form):
            if isinstance(tokens, RowError):
                yield index, tokens
            else:
                vector = VectorRequest(form=form, pooled_from=tokens.pooled_from)
                yield index, EmbedRequest(request_id=index, token_ids=tokens.ids, vector=vector)

    for finished in _run(engine, requests()):
        if finished.error is not None:
            failed[finished.request_id] = finished.error
        else:
            assert finished.vector is not None
            vectors[finished.request_id] = finished.vector
    if failed:
        first = min(failed)
        more = f" ({len(failed) - 1} other texts failed too)" if len(failed) > 1 else ""
        raise ValueError(f"text {first} has no embedding: {failed[first].code}: {failed[first].message}{more}")
    return vectors


def _check_prompts(engine: Engine, prompts: Sequence[Prompt | EmbeddedText]) -> None:
    if isinstance(prompts, str):
        raise ValueError("give a list of texts, not one text")
    if engine.has_work:
        raise ValueError("the engine is at work on other requests; finish or abort them first, or use add and step")
    if engine.tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("this engine has no tokenizer, so it takes no text; give token ids")


def _tokenized(engine: Engine, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Tokens]]:
    for begin in range(0, len(prompts), _TOKENIZED_TOGETHER):
        chunk = prompts[begin : begin + _TOKENIZED_TOGETHER]
        texts = [_text(prompt) for prompt in chunk if isinstance(prompt, str)]
        encoded: Iterator[Tokens] = iter(())
        if texts:
            assert engine.tokenizer is not None
            encoded = iter(engine.tokenizer.encode_batch(texts))
        for index, prompt in enumerate(chunk, start=begin):
            yield index, next(encoded) if isinstance(prompt, str) else [int(token) for token in prompt]


def _encoded(
    engine: Engine, texts: Sequence[Prompt | EmbeddedText], form: TextForm
) -> Iterator[tuple[int, EmbeddedText | RowError]]:
    encoder = None if engine.tokenizer is None else TextEncoder(engine.tokenizer, form)
    for begin in range(0, len(texts), _TOKENIZED_TOGETHER):
        chunk = texts[begin : begin + _TOKENIZED_TOGETHER]
        written = [_text(text) for text in chunk if isinstance(text, str)]
        encoded = iter(encoder.encode(written) if encoder is not None else ())
        for index, text in enumerate(chunk, start=begin):
            if isinstance(text, str):
                yield index, next(encoded)
            elif isinstance(text, EmbeddedText):
                yield index, text
            else:
                yield index, EmbeddedText([int(token) for token in text])


def _text(text: str) -> PromptText:
    """As the checkpoint's own tokenizer takes a text by default: beginning-of-text added, control tokens parsed."""
    return PromptText(text, add_special_tokens=True, parse_special=True)


def _run(engine: Engine, requests: Iterator[tuple[int, Request | RowError]]) -> Iterator[Finished]:
    """Answer all requests. If that is cut short, by an exception or Ctrl-C, the engine is left without work."""
    alive: set[int] = set()
    more = True
    try:
        while more or engine.has_work:
            for _ in range(_MOST_WAITING - engine.num_waiting):
                index, request = next(requests, (-1, None))
                if request is None:
                    more = False
                    break
                if isinstance(request, RowError):
                    yield Finished(request_id=index, token_ids=[], prompt_tokens=0, error=request)
                else:
                    engine.add(request)
                    alive.add(index)
            for finished in engine.step():
                alive.discard(finished.request_id)
                yield finished
    finally:
        for request_id in alive:
            engine.abort(request_id)


class _Keys:
    """The default key of each prompt: a hash of its token ids and of how often it came before."""

    def __init__(self) -> None:
        self._seen: dict[bytes, int] = {}

    def next(self, tokens: list[int]) -> int:
        prompt = blake2b(array("q", tokens).tobytes(), digest_size=16).digest()
        before = self._seen.get(prompt, 0)
        self._seen[prompt] = before + 1
        return int.from_bytes(blake2b(prompt + before.to_bytes(8, "little"), digest_size=8).digest(), "little")
