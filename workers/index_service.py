"""A served index: one actor that answers texts and vectors, from the shards and the model that stay loaded behind it.

serve-index (the owner)   starts all of them; they end with it, also when it is killed
  front                   the one that clients know by name: has texts embedded, asks all shards, merges their answers,
                          reads the rows that were found
  embedder                holds the model
  shard 0 ... n-1         hold the vectors
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import ray

from pipeline.errors import JobError, RowError, UserError
from pipeline.found_rows import FoundRow
from pipeline.index.centering import Centering
from pipeline.index.expression import Filter
from pipeline.index.faiss_files import check_file
from pipeline.index.manifest import IndexManifest
from pipeline.index.matching import matching_vectors
from pipeline.index.row_map import Place, RowMap
from pipeline.index.search import best, prepare_queries, read_centering
from pipeline.index.selection import Mask
from pipeline.index.versions import folder_of_version
from pipeline.indexed_jobs import IndexedRows, job_folder
from workers import devices
from workers.index_shard import NAMESPACE, Phase, start_shards
from workers.query_embedder import QueryEmbedder, SharedEmbedder, Vector
from workers.settings import EngineSettings
from workers.shard_group import ShardGroup, Watch, answer_of, await_ready, end_actors, get

NAME_PREFIX: Final = "index:"
BEHIND_PREFIX: Final = "behind:"
QUERIES_AT_ONCE: Final = 64
FILTERS_KEPT: Final = 8
CACHE_BYTES: Final = 256 << 20  # of the parts that hold what was found
NAMED_S: Final = 60.0

Nearest = list[tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]  # a query's scores and vector numbers, best first
Answer = list[list[tuple[FoundRow, Place, float]]]  # a query's hits, best first


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What is to be served. `engine` None: without a model, for vectors only. `folder` holds index.json."""

    name: str
    out: str  # the job directory
    folder: str
    manifest: IndexManifest
    engine: EngineSettings | None
    gpu: bool = False  # the model takes one

    @property
    def shard_names(self) -> list[str]:
        return [f"{BEHIND_PREFIX}{self.name}: shard {number}" for number in range(len(self.manifest.shards))]

    @property
    def embedder_name(self) -> str:
        return f"{BEHIND_PREFIX}{self.name}: model"


class EmbedderActor:
    """Answers from the moment that its process is up; the model is loaded in a thread of its own."""

    def __init__(self, served: Serving) -> None:
        self._served = served
        self._embedder: SharedEmbedder | None = None
        self._failure: Exception | None = None
        self._loaded = threading.Event()
        threading.Thread(target=self._load, name="load", daemon=True).start()

    def ping(self) -> tuple[Phase, str]:
        if not self._loaded.is_set():
            return "loading", ""
        return ("ready", "") if self._embedder is not None else ("failed", str(self._failure))

    def embed(self, texts: list[str]) -> list[Vector | RowError]:
        if not self._loaded.is_set():
            raise JobError("the model is still being loaded; ask again in a moment")
        if self._embedder is None:
            assert self._failure is not None
            raise self._failure
        return self._embedder.embed(texts)

    def _load(self) -> None:
        engine = self._served.engine
        assert engine is not None
        try:
            embedder = QueryEmbedder(
                self._served.manifest.provenance, replace(engine, threads=engine.threads or devices.num_cpus())
            )
            embedder.embed(["warm"])  # the first query is not to pay for what is set up with it
            self._embedder = SharedEmbedder(embedder.embed)
        except (UserError, JobError) as error:
            self._failure = error
        except Exception as error:
            self._failure = JobError(f"loading the model failed: {type(error).__name__}: {error}")
        self._loaded.set()


class FrontActor:
    """Holds the map of rows and open parts; everything else of a query is done by who stands behind it."""

    def __init__(self, served: Serving) -> None:
        self._served = served
        shards = [_named(name) for name in served.shard_names]
        self._shards = ShardGroup(shards)
        self._embedder: Any = _named(served.embedder_name) if served.engine is not None else None
        self._reading = threading.Lock()
        self._filtering = threading.Lock()
        self._masks: dict[str, list[Mask]] = {}  # by filter; the oldest comes first
        self._failure = ""
        try:
            manifest = served.manifest
            folder = folder_of_version(Path(served.folder), manifest)
            self._rows = RowMap(check_file(folder, manifest.rows))
            self._centering = read_centering(folder, manifest)
            self._records = IndexedRows(Path(served.out), manifest, cache_bytes=CACHE_BYTES)
        except (UserError, JobError) as error:
            self._failure = str(error)
        self._watch = Watch([*shards, *([self._embedder] if self._embedder is not None else [])])

    def ping(self) -> tuple[Phase, str]:
        return ("failed", self._failure) if self._failure else ("ready", "")

    def behind(self) -> tuple[Serving, Centering | None]:
        """What a client needs to ask the shards itself."""
        if self._failure:
            raise JobError(self._failure)
        return self._served, self._centering

    def about(self) -> dict[str, Any]:
        manifest = self._served.manifest
        return {
            "name": self._served.name,
            "output": self._served.out,
            "index": self._served.folder,
            "model": manifest.provenance.model if self._embedder is not None else None,
            "kind": manifest.kind,
            "dimension": manifest.dimension,
            "vectors": manifest.num_vectors,
            "shards": len(manifest.shards),
        }

    def search_texts(self, texts: list[str], k: int, filter: str | None = None) -> Answer:
        """UserError for a text that can't be embedded, JobError where what stands behind has no answer in seconds."""
        return self.search_vectors(self.embed(texts), k, filter)

    def search_vectors(self, vectors: npt.NDArray[Any], k: int, filter: str | None = None) -> Answer:
        """Among the rows that `filter` means. UserError where it is not understood."""
        found = self.nearest(vectors, k, filter)
        numbers = np.concatenate([numbers[numbers >= 0] for _, numbers in found]) if found else np.empty(0, np.int64)
        with self._reading:
            places = iter(self._rows.places(numbers))
            each = [
                [
                    (next(places), score)
                    for number, score in zip(numbers.tolist(), scores.tolist(), strict=True)
                    if number >= 0
                ]
                for scores, numbers in found
            ]
            records = self._records.read({place for hits in each for place, _ in hits})
        return [[(records[place.record], place, score) for place, score in hits] for hits in each]

    def nearest(self, vectors: npt.NDArray[Any], k: int, filter: str | None = None) -> Nearest:
        """Scores and vector numbers [up to k] of each query, best first."""
        if self._failure:
            raise JobError(self._failure)
        queries = prepare_queries(vectors, self._served.manifest, self._centering)
        allowed = None if filter is None else self._allowed(filter)
        scores, numbers = best(self._shards.search(queries, k, allowed), k)
        return list(zip(scores, numbers, strict=True))

    def _allowed(self, filter: str) -> list[Mask]:
        """Of each shard's vectors. Those of the last filters stay."""
        with self._filtering:
            if filter not in self._masks:
                served = self._served
                out = Path(served.out)
                folder = folder_of_version(Path(served.folder), served.manifest)
                mask = matching_vectors(folder, served.manifest, Filter.parse(filter), lambda job: job_folder(out, job))
                shards = served.manifest.shards
                self._masks[filter] = [mask[one.first_vector :][: one.num_vectors] for one in shards]
                while len(self._masks) > FILTERS_KEPT:
                    del self._masks[next(iter(self._masks))]
            return self._masks[filter]

    def embed(self, texts: list[str]) -> npt.NDArray[np.float32]:
        """[n, d]."""
        if self._embedder is None:
            raise UserError(f"{self._served.name} is served without its model: ask with vectors")
        model = self._embedder
        found = answer_of(model, "the model", lambda: model.embed.remote(texts))
        vectors = []
        for text, one in zip(texts, found, strict=True):
            if isinstance(one, RowError):
                shown = repr(text if len(text) <= 40 else text[:39] + "…")
                raise UserError(f"query {shown}: {one.message}")
            vectors.append(one)
        return np.stack(vectors)


class IndexService:
    """Keeps an index served from this process, which Ray is connected to: when it ends, so do its actors."""

    def __init__(self, served: Serving) -> None:
        """UserError where the name is taken."""
        self._served = served
        options: dict[str, Any] = {
            "num_cpus": 0,
            "max_restarts": -1,
            "max_task_retries": 0,
            "max_concurrency": QUERIES_AT_ONCE,
            "concurrency_groups": {"health": 1},
            "namespace": NAMESPACE,
        }
        try:
            self._front: Any = _actor(FrontActor, options | {"name": NAME_PREFIX + served.name}).remote(served)
        except ValueError as error:
            raise UserError(f"an index is served as {served.name!r} already: give another --name") from error
        self._shards = start_shards(Path(served.folder), served.manifest, names=served.shard_names)
        self._embedder: Any = None
        if served.engine is not None:
            own = {"name": served.embedder_name, "num_gpus": 1 if served.gpu else 0}
            self._embedder = _actor(EmbedderActor, options | own).remote(served)
        self._watch = Watch([self._front])

    @property
    def _actors(self) -> dict[str, Any]:
        named = {f"shard {number}": shard for number, shard in enumerate(self._shards)}
        return named | ({"the model": self._embedder} if self._embedder is not None else {}) | {"front": self._front}

    def wait_ready(self) -> None:
        """Until every actor is ready. UserError or JobError, with the reason, where one can't be."""
        await_ready(self._actors, user_errors=["the model"])

    def about(self) -> dict[str, Any]:
        return cast(dict[str, Any], get(self._front.about.remote()))

    def close(self) -> None:
        self._watch.close()
        end_actors(list(reversed(self._actors.values())))


def _actor(kind: type, options: dict[str, Any]) -> Any:
    return ray.remote(**options)(kind)


def _named(name: str) -> Any:
    """The actor of that name, which is being started. JobError where it does not come."""
    deadline = time.monotonic() + NAMED_S
    while True:
        try:
            return ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            if time.monotonic() > deadline:
                raise JobError(f"{name} was not started") from None
            time.sleep(0.02)


class IndexClient:
    """Someone who asks a served index. Ray is connected. UserError where nothing is served as `name`."""

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            self._front: Any = ray.get_actor(NAME_PREFIX + name, namespace=NAMESPACE)
        except ValueError:
            names = served_names()
            others = f"; served are: {', '.join(names)}" if names else "; nothing is served there"
            raise UserError(f"no index is served as {name!r}{others} (see gristmill serve-index)") from None
        self._shards: tuple[ShardGroup, IndexManifest, Centering | None] | None = None

    def about(self) -> dict[str, Any]:
        return cast(dict[str, Any], self._ask("about"))

    def search_texts(self, texts: Sequence[str], k: int, filter: str | None = None) -> Answer:
        return cast(Answer, self._ask("search_texts", list(texts), k, filter))

    def search_vectors(self, vectors: npt.NDArray[Any], k: int, filter: str | None = None) -> Answer:
        return cast(Answer, self._ask("search_vectors", vectors, k, filter))

    def nearest(self, vectors: npt.NDArray[Any], k: int) -> Nearest:
        """As the front's, but the shards are asked without it, which saves a call."""
        if self._shards is None:
            served, centering = cast(tuple[Serving, Centering | None], self._ask("behind"))
            shards = [_named(name) for name in served.shard_names]
            self._shards = ShardGroup(shards), served.manifest, centering
        group, manifest, centering = self._shards
        scores, numbers = best(group.search(prepare_queries(vectors, manifest, centering), k), k)
        return list(zip(scores, numbers, strict=True))

    def _ask(self, method: str, *arguments: Any) -> Any:
        send = getattr(self._front, method).remote
        return answer_of(self._front, f"the index served as {self.name!r}", lambda: send(*arguments))


def served_names() -> list[str]:
    """What indexes are served on the connected Ray."""
    actors = cast(list[dict[str, str]], ray.util.list_named_actors(all_namespaces=True))
    return sorted(
        actor["name"].removeprefix(NAME_PREFIX)
        for actor in actors
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(NAME_PREFIX)
    )
