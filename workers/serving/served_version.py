"""One version of an index as it is served: a query begun with it is answered by it alone, whatever comes after."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.found_rows import FoundRow
from pipeline.index.expression import Filter
from pipeline.index.faiss_files import check_file
from pipeline.index.manifest import IndexManifest
from pipeline.index.matching import matching_vectors
from pipeline.index.row_map import Place, RowMap
from pipeline.index.search import best, prepare_queries, read_centering
from pipeline.index.selection import Mask
from pipeline.index.version_files import read_version
from pipeline.indexed_jobs import IndexedRows, job_folder
from workers.serving.shard_group import ShardGroup

FILTERS_KEPT: Final = 8
CACHE_BYTES: Final = 256 << 20  # of the parts that hold what was found

Found = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]  # scores and vector numbers [q, up to k], best first
Answer = list[list[tuple[FoundRow, Place, float]]]  # a query's hits, best first


class ServedVersion:
    """`shards` are the actors that hold its vectors, by number. May be used by several threads at once."""

    def __init__(self, out: Path, folder: Path, manifest: IndexManifest, shards: Sequence[Any]) -> None:
        """`out` is the job directory, `folder` where index.json is. JobError where a file is damaged or missing, or a
        shard can't answer by this version."""
        self.manifest = manifest
        self.digest = manifest.digest
        self.shards = ShardGroup(shards, self.digest)
        self._out = out
        self._folder = folder
        self._reading = threading.Lock()
        self._filtering = threading.Lock()
        self._masks: dict[str, list[Mask]] = {}  # by filter; the oldest comes first
        self._using = threading.Condition()
        self._num_using = 0
        self._rows, self._centering = read_version(
            folder,
            manifest,
            lambda where: (RowMap(check_file(where, manifest.rows)), read_centering(where, manifest)),
        )
        self._records = IndexedRows(out, manifest, cache_bytes=CACHE_BYTES)
        self.shards.hold()

    def begin(self) -> None:
        """Before a query, and not after `await_unused`."""
        with self._using:
            self._num_using += 1

    def end(self) -> None:
        """After it."""
        with self._using:
            self._num_using -= 1
            self._using.notify_all()

    def await_unused(self, timeout_s: float) -> None:
        """Returns when the last query has its answer, or after so long."""
        deadline = time.monotonic() + timeout_s
        with self._using:
            while self._num_using and time.monotonic() < deadline:
                self._using.wait(deadline - time.monotonic())
        self.shards.close()

    def nearest(self, vectors: npt.NDArray[Any], k: int, filter: str | None) -> Found:
        """Among the rows that `filter` means. UserError where it is not understood, or a vector is no query."""
        queries = prepare_queries(vectors, self.manifest, self._centering)
        found = self.shards.search(queries, k, None if filter is None else self._allowed(filter))
        return found[0] if len(found) == 1 else best(found, k)

    def search(self, vectors: npt.NDArray[Any], k: int, filter: str | None) -> Answer:
        """As `nearest`, with the rows that were found."""
        scores, numbers = self.nearest(vectors, k, filter)
        with self._reading:
            places = iter(self._rows.places(numbers[numbers >= 0]))
            each = [
                [(next(places), score) for number, score in zip(*hits, strict=True) if number >= 0]
                for hits in zip(numbers.tolist(), scores.tolist(), strict=True)
            ]
            records = self._records.read({place for hits in each for place, _ in hits})
        return [[(records[place.record], place, score) for place, score in hits] for hits in each]

    def _allowed(self, filter: str) -> list[Mask]:
        """Of each shard's vectors. Those of the last filters stay, and who asks by them waits for no other's."""
        known = self._masks.get(filter)
        if known is not None:
            return known
        with self._filtering:
            if filter not in self._masks:
                wanted = Filter.parse(filter)
                mask = read_version(
                    self._folder,
                    self.manifest,
                    lambda where: matching_vectors(
                        where, self.manifest, wanted, lambda job: job_folder(self._out, job)
                    ),
                )
                self._masks[filter] = [mask[one.first_vector :][: one.num_vectors] for one in self.manifest.shards]
                while len(self._masks) > FILTERS_KEPT:
                    del self._masks[next(iter(self._masks))]
            return self._masks[filter]
