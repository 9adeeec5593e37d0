"""A served index: one actor that answers texts and vectors, from the shards and the model that stay loaded behind it.

serve-index (the owner)   starts all of them; they end with it, also when it is killed. Says which version is served
  front                   the one that clients know by name: has texts embedded, asks all shards, merges their answers,
                          reads the rows that were found
  embedder                holds the model
  shard 0 ... n-1         hold the vectors
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import ray

from pipeline.errors import UserError
from pipeline.index.manifest import IndexManifest
from workers.index_shard import NAMESPACE, start_shards
from workers.serving.actor_calls import PLACING_S, Phase, await_ready, end_actors, get
from workers.serving.actor_watch import Watch
from workers.serving.embedder_actor import EMBEDDINGS_AT_ONCE, EmbedderActor
from workers.serving.index_front import QUERIES_AT_ONCE, FrontActor
from workers.settings import EngineSettings

NAME_PREFIX: Final = "index:"
BEHIND_PREFIX: Final = "behind:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What is to be served. `engine` None: without a model, for vectors only. `folder` holds index.json."""

    name: str
    out: str  # the job directory
    folder: str
    manifest: IndexManifest
    engine: EngineSettings | None
    gpu: bool = False  # the model takes one


class IndexService:
    """Keeps an index served from this process, which Ray is connected to: when it ends, so do its actors."""

    def __init__(self, serving: Serving) -> None:
        """UserError where the name is taken."""
        self._serving = serving
        self._num_started = 0  # shards, ever
        try:
            self._front = _actor(FrontActor, NAME_PREFIX + serving.name, QUERIES_AT_ONCE).remote(
                serving.name, serving.out, serving.folder
            )
        except ValueError as error:
            raise UserError(f"an index is served as {serving.name!r} already: give another --name") from error
        self._embedder: Any = None
        if serving.engine is not None:
            behind = _actor(EmbedderActor, f"{BEHIND_PREFIX}{serving.name}: model", EMBEDDINGS_AT_ONCE)
            self._embedder = behind.options(num_gpus=1 if serving.gpu else 0).remote(
                serving.manifest.provenance, serving.engine
            )
        self._changing = threading.Lock()
        self._told: Any = None  # what the front was told last, when it has done so
        self._manifest = serving.manifest
        self._starting: list[Any] = []
        self._shards = self._start_shards(serving.manifest, range(len(serving.manifest.shards)))
        self._watch = Watch([self._front], self._on_front)

    @property
    def manifest(self) -> IndexManifest:
        """Of the version that is served."""
        return self._manifest

    def wait_ready(self) -> None:
        """Until every actor is ready. UserError or JobError, with the reason, where one can't be."""
        await_ready({f"shard {number}": shard for number, shard in enumerate(self._shards)})
        if self._embedder is not None:
            await_ready({"the model": self._embedder}, user_errors=["the model"])
        with self._changing:
            told = self._told = self._tell_front()
        get(told, PLACING_S)

    def about(self) -> dict[str, Any]:
        return cast(dict[str, Any], get(self._front.about.remote()))

    def take_version(self, manifest: IndexManifest) -> None:
        """Serve this version of the index from now on; returns when no query is answered by the one before.

        Shards whose file both have stay as they are; until the new ones are loaded, both versions' are in memory.
        UserError where it embeds otherwise, JobError where it can't be served; the one before is served on then.
        """
        difference = manifest.provenance.difference(self._manifest.provenance)
        if difference is not None:
            raise UserError(f"its vectors were made with another {difference}: start serve-index again")
        before, old = self._manifest, self._shards
        held = {shard.identity: actor for shard, actor in zip(before.shards, old, strict=True)}
        numbers = [number for number, shard in enumerate(manifest.shards) if shard.identity not in held]
        self._starting = self._start_shards(manifest, numbers)
        started = dict(zip(numbers, self._starting, strict=True))
        shards = [
            started[number] if number in started else held[shard.identity]
            for number, shard in enumerate(manifest.shards)
        ]
        try:
            await_ready({f"shard {number}": actor for number, actor in started.items()})
            get(self._change(manifest, shards))
        except BaseException:
            self._change(before, old)
            end_actors(self._starting)
            raise
        finally:
            self._starting = []
        end_actors([actor for actor in old if actor not in shards])

    def close(self) -> None:
        self._watch.close()
        behind = [] if self._embedder is None else [self._embedder]
        end_actors([self._front, *behind, *self._shards, *self._starting])

    def _change(self, manifest: IndexManifest, shards: list[Any]) -> Any:
        """From here on a front that is started again is told of this version."""
        with self._changing:
            self._manifest, self._shards = manifest, shards
            self._told = self._tell_front()
            return self._told

    def _on_front(self, phase: Phase, served: str) -> None:
        """A front that was started again knows nothing."""
        with self._changing:
            is_heard = self._told is None or bool(ray.wait([self._told], timeout=0)[0])
            if is_heard and (phase != "ready" or served != self._manifest.digest):
                self._told = self._tell_front()

    def _tell_front(self) -> Any:
        return self._front.serve.remote(self._manifest, self._shards, self._embedder)

    def _start_shards(self, manifest: IndexManifest, numbers: range | list[int]) -> list[Any]:
        first, self._num_started = self._num_started, self._num_started + len(numbers)
        names = [f"{BEHIND_PREFIX}{self._serving.name}: shard {first + place}" for place in range(len(numbers))]
        return start_shards(Path(self._serving.folder), manifest, numbers=numbers, names=names)


def _actor(kind: type, name: str, at_once: int) -> Any:
    options: dict[str, Any] = {
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": 0,  # what was under way is asked again by who asked
        "max_concurrency": at_once,
        "concurrency_groups": {"health": 1},
        "namespace": NAMESPACE,
        "name": name,
    }
    return ray.remote(**options)(kind)
