"""The Ray actor that holds one FAISS shard: it reads its file once and answers searches as long as it lives.

It answers from the moment that its process is up; the file is read in a thread of its own. An index may change while it
is held: as long as a version has the same file, the shard answers by it, and each search says by which.

q: queries; k: hits a query; d: width of a vector.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import ray

from pipeline.errors import JobError
from pipeline.index.deletions import read_deleted
from pipeline.index.faiss_files import faiss_threads
from pipeline.index.manifest import IndexManifest, Shard
from pipeline.index.search import IndexShard
from pipeline.index.selection import Mask
from pipeline.index.version_files import read_version
from pipeline.index.versions import versions_present
from workers import devices
from workers.serving.actor_calls import Phase
from workers.serving.query_listener import QueryListener
from workers.serving.query_messages import Message, respond
from workers.serving.query_wire import Door

Found = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]  # scores and vector numbers, each [q, up to k]

NAMESPACE: Final = "gristmill"  # of all our names in Ray
LOADING_S: Final = 10.0  # that a search waits for a shard which is being loaded, until it fails
SEARCHES_AT_ONCE: Final = 8
VERSIONS_KEPT: Final = 2
_MEMORY_SLACK: Final = 1.1  # what a shard takes, by the size of its file


class IndexShardActor:
    """`neighbours` is how many shards share its node, and with it the processors."""

    def __init__(self, folder: str, manifest: IndexManifest, number: int, *, neighbours: int) -> None:
        self._folder = Path(folder)
        self._manifest = manifest
        self._number = number
        self._threads = max(devices.num_cpus() // neighbours, 1)
        self._shard: IndexShard | None = None
        self._versions: dict[str, IndexShard] = {}  # by the manifest's digest; what was used last comes last
        self._choosing = threading.Lock()
        self._failure = ""
        self._loaded = threading.Event()
        self._listener: QueryListener | None = None
        threading.Thread(target=self._load, name="load", daemon=True).start()

    def ping(self) -> tuple[Phase, str]:
        """What it does, and why it can't."""
        if not self._loaded.is_set():
            return "loading", ""
        return ("ready", "") if self._shard is not None else ("failed", self._failure)

    def door(self) -> Door | None:
        """Where it listens, from the first time that this is asked."""
        if self._listener is None:
            self._listener = QueryListener.open(node_address(), self.answer, at_once=SEARCHES_AT_ONCE)
        return self._listener.door if self._listener is not None else None

    def answer(self, request: bytes | bytearray) -> bytes:
        return respond({"search": self._answer_search, "hold": self._answer_hold}, request)

    def search(self, version: str, queries: npt.NDArray[np.float32], k: int, allowed: Mask | None = None) -> Found:
        """Among the vectors of that version of the shard that are `allowed` [n], or all.

        For queries [q, d] as the index compares them. JobError where the file is damaged or not read yet, or the
        version is not there any more.
        """
        shard = self._of_version(version)
        with faiss_threads(self._threads):  # it is the setting of this thread
            return shard.search(queries, k, allowed)

    def _answer_search(self, request: Message) -> Message:
        queries, *masks = request.arrays
        allowed = None
        if masks:
            allowed = np.unpackbits(masks[0], count=request.values["vectors"]).view(np.bool_)
        return Message(arrays=self.search(request.values["version"], queries, request.values["k"], allowed))

    def _answer_hold(self, request: Message) -> Message:
        self._of_version(request.values["version"])
        return Message()

    def _of_version(self, version: str) -> IndexShard:
        if not self._loaded.wait(LOADING_S):
            size_mib = self._manifest.shards[self._number].size_bytes / (1 << 20)
            raise JobError(f"shard {self._number} is still being loaded ({size_mib:,.0f} MiB); ask again in a moment")
        if self._shard is None:
            raise JobError(self._failure)
        with self._choosing:
            if version not in self._versions:
                self._versions[version] = self._read_version(version)
                while len(self._versions) > VERSIONS_KEPT:
                    del self._versions[next(iter(self._versions))]
            return self._versions[version]

    def _read_version(self, version: str) -> IndexShard:
        assert self._shard is not None
        for _, manifest in versions_present(self._folder):
            contents = self._contents_in(manifest)
            if manifest.digest == version and contents is not None:
                deleted = read_version(self._folder, manifest, partial(read_deleted, manifest=manifest))
                return self._shard.as_of(contents, deleted)
        raise JobError(
            f"the version that was asked for of the index in {self._folder} is not there any more; ask again"
        )

    def _read_shard(self) -> tuple[IndexManifest, IndexShard]:
        """With the version by which it was read. The index may change meanwhile, again and again."""
        while True:
            manifest = self._version_with_it()
            contents = self._contents_in(manifest)
            assert contents is not None
            load = partial(IndexShard.load, manifest=manifest, number=manifest.shards.index(contents))
            try:
                return manifest, read_version(self._folder, manifest, load)
            except JobError:
                if self._version_with_it() == manifest:
                    raise

    def _version_with_it(self) -> IndexManifest:
        """The version that it was started for, or where that is gone, one that has its file, too."""
        found = self._manifest
        for _, there in versions_present(self._folder):
            if there == self._manifest:
                return there
            if self._contents_in(there) is not None:
                found = there
        return found

    def _contents_in(self, manifest: IndexManifest) -> Shard | None:
        wanted = self._manifest.shards[self._number].identity
        return next((shard for shard in manifest.shards if shard.identity == wanted), None)

    def _load(self) -> None:
        try:
            manifest, shard = self._read_shard()
            self._shard = self._versions[manifest.digest] = shard
        except JobError as error:
            self._failure = str(error)
        except Exception as error:
            self._failure = f"loading shard {self._number} failed: {type(error).__name__}: {error}"
        self._loaded.set()


def search_request(version: str, queries: npt.NDArray[np.float32], k: int, allowed: Mask | None) -> bytes:
    values = {"ask": "search", "version": version, "k": k}
    if allowed is None:
        return Message(values, (queries,)).to_bytes()
    return Message(values | {"vectors": len(allowed)}, (queries, np.packbits(allowed))).to_bytes()


def holding_request(version: str) -> Message:
    return Message({"ask": "hold", "version": version})


def node_address() -> str:
    """Under which Ray's processes reach this node."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def start_shards(
    folder: Path, manifest: IndexManifest, *, numbers: Sequence[int] | None = None, names: Sequence[str] | None = None
) -> list[Any]:
    """An actor for each shard, or those of these `numbers`, spread over the nodes; they begin to load.

    `names` are theirs in NAMESPACE.

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
    for place, number in enumerate(range(len(manifest.shards)) if numbers is None else numbers):
        own: dict[str, Any] = {"memory": int(manifest.shards[number].size_bytes * _MEMORY_SLACK)}
        if names is not None:
            own |= {"name": names[place], "namespace": NAMESPACE}
        actor: Any = ray.remote(**options | own)(IndexShardActor)
        actors.append(actor.remote(str(folder), manifest, number, neighbours=neighbours))
    return actors
