"""A small job whose index grows: built, added to, compacted and asked."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.audit import audit
from pipeline.commits import CommitLog
from pipeline.index.build import build_index
from pipeline.index.check import IndexedParts
from pipeline.index.compaction import compact
from pipeline.index.deletions import delete_vectors
from pipeline.index.growth import Addition, add_job
from pipeline.index.manifest import IndexManifest, Provenance
from pipeline.index.search import VectorIndex
from pipeline.index.versions import change_index
from pipeline.job_folder import JobFolder, write_job, write_plan
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout

KINDS = ["Flat", "SQ8", "IVF4,Flat", "HNSW8", "PCA7,SQ8", "PCA7,IVF4,Flat", "SQ8,RFlat", "PCA7,HNSW8"]
SPLIT_ROWS = 32

Matrix = npt.NDArray[np.float32]


def unit(num_vectors: int, *, seed: int, dimension: int = 8) -> Matrix:
    vectors = np.random.default_rng(seed).normal(size=(num_vectors, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Job:
    """A job that is done, the vectors that it embedded, and what its index was built with."""

    folder: JobFolder
    log: CommitLog
    name: str
    vectors: Matrix
    arguments: Mapping[str, Any]

    def build(self, **changes: Any) -> IndexManifest:
        return build_index(self.folder, self.log.commits, **{**self.arguments, **changes})

    def add(self, other: Job, *, provenance: Provenance | None = None) -> IndexManifest:
        addition = Addition(
            folder=other.folder,
            path=os.path.relpath(other.folder.root, self.folder.root),
            job=other.name,
            commits=other.log.commits,
            provenance=provenance or other.arguments["provenance"],
        )
        return change_index(self.folder, lambda draft, manifest: add_job(draft, manifest, addition))

    def delete(self, *numbers: int) -> IndexManifest:
        gone = np.array(numbers, np.int64)
        return change_index(self.folder, lambda draft, manifest: delete_vectors(draft, manifest, gone))

    def compact(self, others: Sequence[Job] = (), **options: Any) -> IndexManifest:
        parts = [IndexedParts(job.folder, job.log.commits) for job in (self, *others)]
        return change_index(self.folder, lambda draft, manifest: compact(draft, manifest, parts, **options))

    def found(self, queries: Matrix, k: int = 5) -> list[list[tuple[str, int]]]:
        return found_in(self.folder, queries, k)


def found_in(folder: JobFolder, queries: Matrix, k: int = 5) -> list[list[tuple[str, int]]]:
    hits = VectorIndex.open(folder.index).search(queries, k)
    return [[(hit.place.job, hit.place.row) for hit in one] for one in hits]


def finished_job(
    root: Path,
    name: str,
    vectors: Matrix,
    *,
    provenance: Provenance,
    center: bool = False,
    keys: list[Any] | None = None,
    **arguments: Any,
) -> Job:
    """A job in `root/name` that embeds prompts and carries `key`, indexed as `build_index` is told by `arguments`."""
    folder = JobFolder(root / name)
    log = CommitLog(folder, fingerprint=f"of {name}")
    log.recover()
    carried = pa.record_batch({"key": keys or [f"{name}-{row}" for row in range(len(vectors))]})
    layout = RecordLayout.of(samples=0, embeds="prompt", dimension=vectors.shape[1], carried=carried.schema)
    splits = []
    for split, first in enumerate(range(0, len(vectors), SPLIT_ROWS)):
        count = min(SPLIT_ROWS, len(vectors) - first)
        splits.append({"index": split, "first_row": first, "num_rows": count})
        builder = PartBuilder(layout, split=split, first_row=first, num_rows=count)
        builder.carry(first, carried.slice(first, count))
        for row in range(first, first + count):
            builder.add_vector(row, "prompt", vectors[row], prompt_tokens=1)
        log.publish(log.commit(builder.write(folder)))
    spec = {
        "output": {"columns": ["key"]},
        "generate": None,
        "embed": {"template": None},
        "prompt": {"template": None, "column": "key"},
        "index": {},
    }
    write_job(folder, fingerprint=f"of {name}", document={"spec": spec})
    write_plan(folder, fingerprint=f"of {name}", splits=splits, document={})
    made = Job(folder, log, name, vectors, {"job": name, "provenance": provenance, "center": center, **arguments})
    made.build()
    return made


Make = Callable[..., Job]  # (name, vectors, **arguments), as the fixture `job` gives it


def assert_whole(folder: JobFolder) -> None:
    found = audit(folder.root)
    assert (found.problems, found.pending) == ((), ())


def all_found(index: VectorIndex) -> set[int]:
    """Every vector that can be found: among half of them an approximate kind looks until it has found all."""
    even = np.arange(index.manifest.num_vectors) % 2 == 0
    query = unit(1, seed=3)
    return {hit.vector for half in (even, ~even) for hit in index.search(query, 500, allowed=half)[0]}
