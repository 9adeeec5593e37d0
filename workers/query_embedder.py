"""Queries -> vectors, as an index's provenance says its rows were made. Holds the model as long as it lives."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.embedding import EmbeddedText, TextEncoder, query_forms
from pipeline.errors import RowError, UserError
from pipeline.index.manifest import Provenance
from pipeline.model_path import model_digest
from pipeline.prompts import QueryText
from pipeline.sentence_transformers import read_embedder
from pipeline.tokenizer import load_tokenizer
from workers.engine.request import EmbedRequest, VectorRequest
from workers.settings import EngineSettings, load_callable

Vector = npt.NDArray[np.float32]  # [d]
Embed = Callable[[Sequence[str]], "list[Vector | RowError]"]


class QueryEmbedder:
    """Loads the model. UserError where it is another than the index's by now, or can't embed as the index says."""

    def __init__(self, made: Provenance, engine: EngineSettings) -> None:
        model_path = Path(engine.model_path)
        tokenizer = load_tokenizer(model_path)
        refuse_changed_model(made, model_path, tokenizer.digest)
        try:
            self._form, text_form = query_forms(made.pooling, made.settings)
        except ValueError as error:
            raise UserError(f"query: {error}") from None
        self._query_text = QueryText(made.query_template)
        self._max_tokens = read_embedder(model_path, pooling_is_given=True).max_tokens
        self._encoder = TextEncoder(tokenizer, text_form)
        self._engine: Any = load_callable(engine.factory)(engine).engine

    def embed(self, texts: Sequence[str]) -> list[Vector | RowError]:
        """A vector [d] a text, or why it has none: one text never takes the others with it."""
        found: list[Vector | RowError] = [RowError("empty_prompt", "the text is empty")] * len(texts)
        prompts = []
        for place, text in enumerate(texts):
            try:
                prompts.append((place, self._query_text.build(text)))
            except UserError as error:
                found[place] = RowError("empty_prompt", str(error).removeprefix("query: "))
        tokens: list[tuple[int, EmbeddedText]] = []
        encoded = self._encoder.encode([prompt for _, prompt in prompts])
        for (place, _), one in zip(prompts, encoded, strict=True):
            if isinstance(one, RowError):
                found[place] = one
            elif not one.ids:
                found[place] = RowError("empty_prompt", "the text has no tokens")
            elif self._max_tokens is not None and len(one.ids) > self._max_tokens:  # as of rows
                found[place] = RowError(
                    "prompt_too_long",
                    f"{len(one.ids):,} tokens with its prompt, and the model's own limit is {self._max_tokens:,}",
                )
            else:
                tokens.append((place, one))
        return self._run(found, tokens)

    def _run(self, found: list[Vector | RowError], tokens: list[tuple[int, EmbeddedText]]) -> list[Vector | RowError]:
        """`found` with the vectors of `tokens` in their places."""
        try:
            for place, one in tokens:
                vector = VectorRequest(form=self._form, pooled_from=one.pooled_from)
                try:
                    self._engine.add(EmbedRequest(request_id=place, token_ids=one.ids, vector=vector))
                except ValueError as error:
                    found[place] = RowError("request_too_large", str(error))
            while self._engine.has_work:
                for finished in self._engine.step():
                    found[finished.request_id] = finished.vector if finished.error is None else finished.error
        except BaseException:
            for place, _ in tokens:  # nothing of them is to answer the texts that come next
                self._engine.abort(place)
            raise
        return found


def refuse_changed_model(made: Provenance, model_path: Path, tokenizer: str | None = None) -> None:
    """UserError, saying what differs, unless the model at `model_path` is the one that an index was made with."""
    digest = tokenizer or load_tokenizer(model_path).digest
    here = dataclasses.replace(made, model_files=model_digest(model_path), tokenizer=digest)
    difference = made.difference(here)
    if difference is not None:
        raise UserError(
            f"model {made.model}: changed since the index was made ({difference}); put the old one back or embed anew"
        )


@dataclass(slots=True)
class _Asked:
    texts: Sequence[str]
    found: list[Vector | RowError] = field(default_factory=list)
    error: Exception | None = None
    is_done: bool = False


class SharedEmbedder:
    """Lets many threads use one embedder: who gets it embeds in one batch for all who wait by then.

    Who brings more than `batch_texts` waits for each such part of them anew, behind those that came meanwhile.
    """

    def __init__(self, embed: Embed, *, batch_texts: int = 64) -> None:
        self._embed = embed
        self._batch_texts = batch_texts
        self._turn = threading.Lock()
        self._arrival = threading.Lock()
        self._waiting: list[_Asked] = []

    def embed(self, texts: Sequence[str]) -> list[Vector | RowError]:
        parts = (texts[first : first + self._batch_texts] for first in range(0, len(texts), self._batch_texts))
        return [one for part in parts for one in self._embed_part(part)]

    def _embed_part(self, texts: Sequence[str]) -> list[Vector | RowError]:
        mine = _Asked(texts)
        with self._arrival:
            self._waiting.append(mine)
        while not mine.is_done:
            with self._turn:
                if not mine.is_done:
                    self._serve(self._next_batch())
        if mine.error is not None:
            raise mine.error
        return mine.found

    def _next_batch(self) -> list[_Asked]:
        """Those that came first, up to about `batch_texts`: nobody waits for all who come later."""
        with self._arrival:
            batch = [self._waiting.pop(0)]
            while self._waiting and sum(len(one.texts) for one in batch) < self._batch_texts:
                batch.append(self._waiting.pop(0))
        return batch

    def _serve(self, batch: list[_Asked]) -> None:
        try:
            found = iter(self._embed([text for one in batch for text in one.texts]))
            for one in batch:
                one.found = [next(found) for _ in one.texts]
        except Exception as error:
            for one in batch:
                one.error = error
        finally:
            for one in batch:
                one.is_done = True
