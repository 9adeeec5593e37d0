"""Someone who asks a served index: finds its front by name, and asks that alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import ray

from pipeline.errors import UserError
from workers.index_shard import NAMESPACE
from workers.serving.actor_calls import answer_of
from workers.serving.index_front import nearest_in, rows_in, texts_request, vectors_request
from workers.serving.index_service import NAME_PREFIX
from workers.serving.query_line import REPLACING_S, QueryLine
from workers.serving.served_version import Answer

Nearest = list[tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]  # a query's scores and vector numbers, best first

# So that many need no more memory in the front than few, and nobody waits behind them: while rows are written as JSON
# the front does nothing else, and is taken for dead where that lasts.
QUERIES_A_MESSAGE: Final = 512
ROWS_A_MESSAGE: Final = 5120
NUMBERS_A_MESSAGE: Final = 1 << 20


class IndexClient:
    """May be used by several threads at once. Ray is connected. UserError where nothing is served as `name`."""

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            front: Any = ray.get_actor(NAME_PREFIX + name, namespace=NAMESPACE)
        except ValueError:
            names = served_names()
            others = f"; served are: {', '.join(names)}" if names else "; nothing is served there"
            raise UserError(f"no index is served as {name!r}{others} (see gristmill serve-index)") from None
        self._line = QueryLine(front, f"the index served as {name!r}")

    def about(self) -> dict[str, Any]:
        return self._said_by_front() | {"asked_by": self._line.carrier}

    def output(self) -> str:
        """The job directory whose index is served."""
        return str(self._said_by_front()["output"])

    def search_texts(self, texts: Sequence[str], k: int, filter: str | None = None) -> Answer:
        requests = (texts_request(texts[some], k, filter) for some in _messages(len(texts), k, ROWS_A_MESSAGE))
        return [hits for request in requests for hits in rows_in(self._line.ask(request))]

    def search_vectors(self, vectors: npt.NDArray[Any], k: int, filter: str | None = None) -> Answer:
        parts = _messages(len(vectors), k, ROWS_A_MESSAGE)
        requests = (vectors_request(vectors[some], k, filter, rows=True) for some in parts)
        return [hits for request in requests for hits in rows_in(self._line.ask(request))]

    def nearest(self, vectors: npt.NDArray[Any], k: int, filter: str | None = None) -> Nearest:
        parts = _messages(len(vectors), k, NUMBERS_A_MESSAGE)
        requests = (vectors_request(vectors[some], k, filter, rows=False) for some in parts)
        return [found for request in requests for found in nearest_in(self._line.ask(request))]

    def close(self) -> None:
        self._line.close()

    def _said_by_front(self) -> dict[str, Any]:
        front = self._line.actor
        return cast(dict[str, Any], answer_of(front, self._line.what, front.about.remote, patience_s=REPLACING_S))


def _messages(num_queries: int, k: int, most_hits: int) -> Iterator[slice]:
    """Which queries go together. One goes without any, which is checked as others are."""
    step = max(min(QUERIES_A_MESSAGE, most_hits // max(int(k), 1)), 1)
    return (slice(first, first + step) for first in range(0, max(num_queries, 1), step))


def served_names() -> list[str]:
    """What indexes are served on the connected Ray."""
    actors = cast(list[dict[str, str]], ray.util.list_named_actors(all_namespaces=True))
    return sorted(
        actor["name"].removeprefix(NAME_PREFIX)
        for actor in actors
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(NAME_PREFIX)
    )
