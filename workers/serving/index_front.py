"""The Ray actor that a served index is known by: has texts embedded, asks all shards, merges, reads the rows found."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.errors import JobError, UserError
from pipeline.found_rows import FoundRow
from pipeline.index.manifest import IndexManifest
from pipeline.index.row_map import Place
from workers.index_shard import node_address
from workers.serving.actor_calls import Phase
from workers.serving.actor_watch import Watch
from workers.serving.embedder_actor import embedded
from workers.serving.query_line import QueryLine
from workers.serving.query_listener import QueryListener
from workers.serving.query_messages import Message, respond
from workers.serving.query_wire import Door
from workers.serving.served_version import Answer, ServedVersion

QUERIES_AT_ONCE: Final = 64
DRAIN_S: Final = 60.0  # for queries of the version before, until it is let go

_ROW: Final = FoundRow.__slots__
_row_values: Final = attrgetter(*_ROW)
_place_values: Final = attrgetter(*Place.__slots__)


class FrontActor:
    """Serves nothing until its owner says which version, and which actors hold it: after each start of its process."""

    def __init__(self, name: str, out: str, folder: str) -> None:
        self._name = name
        self._out = Path(out)
        self._folder = Path(folder)
        self._version: ServedVersion | None = None
        self._model: QueryLine | None = None
        self._choosing = threading.Lock()  # which version a query is answered by
        self._changing = threading.Lock()
        self._failure = ""
        self._watch: Watch | None = None
        self._listener: QueryListener | None = None

    def serve(self, manifest: IndexManifest, shards: Sequence[Any], model: Any) -> None:
        """From now on, with these actors. Returns when nothing is answered by another version any more.

        JobError where that can't be; then all stays as it is.
        """
        with self._changing:
            before = self._version
            if before is not None and before.digest == manifest.digest:
                return
            try:
                version = ServedVersion(self._out, self._folder, manifest, shards)
            except (UserError, JobError) as error:
                self._failure = str(error)
                raise
            with self._choosing:
                self._version = version
                self._model = self._model or (None if model is None else QueryLine(model, "the model"))
            if self._watch is not None:
                self._watch.close()
            self._watch = Watch([*shards, *([] if model is None else [model])], num_ready=len(shards))
        if before is not None:
            before.await_unused(DRAIN_S)

    def ping(self) -> tuple[Phase, str]:
        """With the digest of what is served, or why nothing is."""
        if self._version is not None:
            return "ready", self._version.digest
        return ("failed", self._failure) if self._failure else ("loading", "")

    def door(self) -> Door | None:
        """Where it listens, from the first time that this is asked."""
        if self._listener is None:
            self._listener = QueryListener.open(node_address(), self.answer, at_once=QUERIES_AT_ONCE)
        return self._listener.door if self._listener is not None else None

    def about(self) -> dict[str, Any]:
        with self._current() as version:
            manifest = version.manifest
            return {
                "name": self._name,
                "output": str(self._out),
                "index": str(self._folder),
                "model": manifest.provenance.model if self._model is not None else None,
                "kind": manifest.kind,
                "dimension": manifest.dimension,
                "vectors": manifest.num_vectors - manifest.num_deleted,
                "shards": len(manifest.shards),
                "version": manifest.version,
                "shards_asked_by": version.shards.carrier,
            }

    def answer(self, request: bytes | bytearray) -> bytes:
        methods = {
            "search_texts": self._search_texts,
            "search_vectors": self._search_vectors,
            "nearest": self._nearest,
        }
        return respond(methods, request)

    @contextmanager
    def _current(self) -> Iterator[ServedVersion]:
        """The version that a query is answered by, from its begin to its end."""
        with self._choosing:
            if self._version is None:
                raise JobError(self._failure or f"{self._name} is still being started; ask again in a moment")
            version = self._version
            version.begin()
        try:
            yield version
        finally:
            version.end()

    def _search_texts(self, request: Message) -> Message:
        texts, k, filter = (request.values[name] for name in ("texts", "k", "filter"))
        with self._current() as version:
            if self._model is None:
                raise UserError(f"{self._name} is served without its model: ask with vectors")
            vectors = embedded(self._model, texts) if texts else np.empty((0, version.manifest.dimension))
            return _rows_message(version.search(vectors, k, filter))

    def _search_vectors(self, request: Message) -> Message:
        with self._current() as version:
            (vectors,) = request.arrays
            return _rows_message(version.search(vectors, request.values["k"], request.values["filter"]))

    def _nearest(self, request: Message) -> Message:
        with self._current() as version:
            (vectors,) = request.arrays
            return Message(arrays=version.nearest(vectors, request.values["k"], request.values["filter"]))


def texts_request(texts: Sequence[str], k: int, filter: str | None) -> Message:
    return Message({"ask": "search_texts", "texts": list(texts), "k": int(k), "filter": filter})


def vectors_request(vectors: npt.NDArray[Any], k: int, filter: str | None, *, rows: bool) -> Message:
    """With `rows` for `rows_in`, without for `nearest_in`. UserError for what is no array of numbers."""
    if vectors.dtype.kind not in "fiu":
        raise UserError(f"the query vector is of type {vectors.dtype}, not of numbers")
    return Message({"ask": "search_vectors" if rows else "nearest", "k": int(k), "filter": filter}, (vectors,))


def rows_in(answer: Message) -> Answer:
    return [
        [(FoundRow(**dict(zip(_ROW, row, strict=True))), Place(*place), score) for row, place, score in hits]
        for hits in answer.values
    ]


def nearest_in(answer: Message) -> list[tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]:
    """A query's scores and vector numbers each, best first, without what was not found."""
    scores, numbers = answer.arrays
    found = numbers >= 0
    return [(scores[query][found[query]], numbers[query][found[query]]) for query in range(len(numbers))]


def _rows_message(answer: Answer) -> Message:
    """Without the names of what each hit says: they would be most of the message."""
    return Message([[(_row_values(row), _place_values(place), score) for row, place, score in hits] for hits in answer])
