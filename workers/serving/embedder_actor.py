"""The Ray actor that holds the model of a served index, and embeds the texts that are asked for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from pipeline.errors import JobError, RowError, UserError
from pipeline.index.manifest import Provenance
from workers import devices
from workers.index_shard import LOADING_S, node_address
from workers.query_embedder import QueryEmbedder, SharedEmbedder
from workers.serving.actor_calls import Phase
from workers.serving.query_line import QueryLine
from workers.serving.query_listener import QueryListener
from workers.serving.query_messages import Message, respond
from workers.serving.query_wire import Door
from workers.settings import EngineSettings

EMBEDDINGS_AT_ONCE: Final = 64  # those that wait are embedded together


class EmbedderActor:
    """Answers from the moment that its process is up; the model is loaded in a thread of its own."""

    def __init__(self, made: Provenance, engine: EngineSettings) -> None:
        self._made = made
        self._engine = engine
        self._embedder: SharedEmbedder | None = None
        self._failure: Exception | None = None
        self._loaded = threading.Event()
        self._listener: QueryListener | None = None
        threading.Thread(target=self._load, name="load", daemon=True).start()

    def ping(self) -> tuple[Phase, str]:
        if not self._loaded.is_set():
            return "loading", ""
        return ("ready", "") if self._embedder is not None else ("failed", str(self._failure))

    def door(self) -> Door | None:
        """Where it listens, from the first time that this is asked."""
        if self._listener is None:
            self._listener = QueryListener.open(node_address(), self.answer, at_once=EMBEDDINGS_AT_ONCE)
        return self._listener.door if self._listener is not None else None

    def answer(self, request: bytes | bytearray) -> bytes:
        return respond({"embed": self._embed}, request)

    def _embed(self, request: Message) -> Message:
        """The vectors [n, d] of the texts that have one, and why the others have none, by their places."""
        if not self._loaded.wait(LOADING_S):
            raise JobError("the model is still being loaded; ask again in a moment")
        if self._embedder is None:
            assert self._failure is not None
            raise self._failure
        found = self._embedder.embed(request.values["texts"])
        failed = {place: one.message for place, one in enumerate(found) if isinstance(one, RowError)}
        vectors = [one for one in found if not isinstance(one, RowError)]
        return Message(failed, (np.stack(vectors),) if vectors else ())

    def _load(self) -> None:
        try:
            threads = self._engine.threads or devices.num_cpus()
            embedder = QueryEmbedder(self._made, replace(self._engine, threads=threads))
            embedder.embed(["warm"])  # the first query is not to pay for what is set up with it
            self._embedder = SharedEmbedder(embedder.embed)
        except (UserError, JobError) as error:
            self._failure = error
        except Exception as error:
            self._failure = JobError(f"loading the model failed: {type(error).__name__}: {error}")
        self._loaded.set()


def embedded(model: QueryLine, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """[n, d] by an EmbedderActor. UserError for the first text that has no vector."""
    answer = model.ask(Message({"ask": "embed", "texts": list(texts)}))
    if answer.values:
        place = min(map(int, answer.values))
        text = texts[place]
        shown = repr(text if len(text) <= 40 else text[:39] + "…")
        raise UserError(f"query {shown}: {answer.values[str(place)]}")
    return answer.arrays[0]
