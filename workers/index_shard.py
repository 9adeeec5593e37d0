"""The Ray actor that holds one FAISS shard: it reads its file once and answers searches as long as it lives.

It answers from the moment that its process is up; the file is read in a thread of its own. q: queries; k: hits a query;
d: width of a vector.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import ray

from pipeline.errors import JobError
from pipeline.index.faiss_files import faiss_threads
from pipeline.index.manifest import IndexManifest
from pipeline.index.search import IndexShard
from pipeline.index.selection import Mask
from pipeline.index.versions import folder_of_version
from workers import devices

Phase = Literal["loading", "ready", "failed"]
Found = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]  # scores and vector numbers, each [q, up to k]

NAMESPACE: Final = "gristmill"  # of all our names in Ray
LOADING_S: Final = 10.0  # that a search waits for a shard which is being loaded, until it fails
SEARCHES_AT_ONCE: Final = 8
_MEMORY_SLACK: Final = 1.1  # what a shard takes, by the size of its file


class IndexShardActor:
    """`neighbours` is how many shards share its node, and with it the processors."""

    def __init__(self, folder: str, manifest: IndexManifest, number: int, *, neighbours: int) -> None:
        self._folder = Path(folder)
        self._manifest = manifest
        self._number = number
        self._threads = max(devices.num_cpus() // neighbours, 1)
        self._shard: IndexShard | None = None
        self._failure = ""
        self._loaded = threading.Event()
        threading.Thread(target=self._load, name="load", daemon=True).start()

    def ping(self) -> tuple[Phase, str]:
        """What it does, and why it can't."""
        if not self._loaded.is_set():
            return "loading", ""
        return ("ready", "") if self._shard is not None else ("failed", self._failure)

    def search(self, queries: npt.NDArray[np.float32], k: int, allowed: Mask | None = None) -> Found:
        """Among the shard's vectors that are `allowed` [n], or all, for queries [q, d] as the index compares them.

        JobError where the file is damaged, or is not read yet.
        """
        if not self._loaded.wait(LOADING_S):
            size_mib = self._manifest.shards[self._number].size_bytes / (1 << 20)
            raise JobError(f"shard {self._number} is still being loaded ({size_mib:,.0f} MiB); ask again in a moment")
        if self._shard is None:
            raise JobError(self._failure)
        with faiss_threads(self._threads):  # it is the setting of this thread
            return self._shard.search(queries, k, allowed)

    def _load(self) -> None:
        try:
            folder = folder_of_version(self._folder, self._manifest)
            self._shard = IndexShard.load(folder, self._manifest, self._number)
        except JobError as error:
            self._failure = str(error)
        except Exception as error:
            self._failure = f"loading shard {self._number} failed: {type(error).__name__}: {error}"
        self._loaded.set()


def start_shards(folder: Path, manifest: IndexManifest, *, names: Sequence[str] | None = None) -> list[Any]:
    """An actor for each shard, spread over the nodes; they begin to load. `names` are theirs in NAMESPACE.

    They belong to this process and end with it. One that dies is started again by Ray, where there is room for it. No
    processors are set aside for them, so that jobs run beside; memory is.
    """
    nodes = max(sum(node["Alive"] for node in ray.nodes()), 1)  # type: ignore[no-untyped-call]
    options: dict[str, Any] = {
        "num_cpus": 0,
        "scheduling_strategy": "SPREAD",
        "max_restarts": -1,
        "max_task_retries": 0,  # a search that was under way is sent again by who asked
        "max_concurrency": SEARCHES_AT_ONCE,
        "concurrency_groups": {"health": 1},
    }
    neighbours = math.ceil(len(manifest.shards) / nodes)
    actors: list[Any] = []
    for number, shard in enumerate(manifest.shards):
        own: dict[str, Any] = {"memory": int(shard.size_bytes * _MEMORY_SLACK)}
        if names is not None:
            own |= {"name": names[number], "namespace": NAMESPACE}
        actor: Any = ray.remote(**options | own)(IndexShardActor)
        actors.append(actor.remote(str(folder), manifest, number, neighbours=neighbours))
    return actors
