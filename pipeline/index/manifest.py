"""index.json: what made an index, the files it consists of, and which committed parts it was built from."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal

from pipeline.commits import Commit
from pipeline.durable import read_sealed
from pipeline.errors import JobError, UserError
from pipeline.index.manifest_soundness import manifest_problem

MANIFEST_NAME: Final = "index.json"
ROWS_NAME: Final = "rows.parquet"
FORMAT: Final = 2
BUILT_AGAIN: Final = "run again, which loses nothing that was added or deleted (a merged index: merge again)"
_UNREADABLE: Final = "`gristmill run` builds it anew from the parts, where nothing was added to it or deleted from it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What makes vectors comparable: a query must be embedded with the same of everything here."""

    model: str  # as the job named it
    model_files: Mapping[str, str]  # file -> sha256
    tokenizer: str  # digest
    pooling: str
    normalisation: Literal["unit", "none"] = "unit"  # unit: queries are scaled to length 1
    query_template: str = "{{ text }}"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # whatever else shapes a vector; JSON values

    def difference(self, other: Provenance) -> str | None:
        """The first thing in which a query's embedding differs from the index's, for people; None where none does.

        The model's name and the template of queries may differ: the files and the texts decide.
        """
        for name in ("model_files", "tokenizer", "pooling", "normalisation", "settings"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                if isinstance(mine, Mapping):
                    changed = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
                    return f"{name} ({', '.join(changed)})"
                return f"{name} ({mine} there, {theirs} here)"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """A file of the index. Vector numbers `first_vector` to `first_vector + num_vectors - 1` are in it."""

    file: str
    sha256: str
    size_bytes: int
    first_vector: int
    num_vectors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard(Contents):
    """A shard's file, and how hard it is to be searched to find what `recall` says.

    `num_vectors` counts its numbers. Of `absent` of them it holds nothing any more: they were deleted, and the index
    compacted since.
    """

    effort: int | None = None  # nprobe or efSearch; None where the kind has neither
    recall: float | None = None  # of its own vectors, as `Recall` has it; None where nothing could be measured
    trials: tuple[Trial, ...] = ()  # what was tried, the least effort first
    absent: int = 0

    @property
    def num_held(self) -> int:
        return self.num_vectors - self.absent

    @property
    def identity(self) -> tuple[str, int, int]:
        """By which a shard is known in another version of its index. Empty ones differ in their numbers alone."""
        return self.sha256, self.first_vector, self.num_vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The recall that searching a shard with this effort gave."""

    effort: int | None
    recall: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """The share of the `k` nearest vectors that the whole index finds of those that an exact search finds."""

    target: float
    reached: float | None  # None where there was nothing to measure with
    num_queries: int  # vectors of the corpus that were not trained on; 0 where the kind is exact, which needs none
    k: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class MissedKind:
    """A kind of `auto` that was built, missed the target and was given up for this one."""

    kind: str
    reached: float


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedJob:
    """The committed parts of one job that are in the index, in the order of rows.

    Their vectors follow those of the jobs before it.
    """

    job: str  # the name in rows.parquet
    fingerprint: str
    num_parts: int
    parts_digest: str  # see `parts_digest`
    num_vectors: int
    path: str = "."  # its directory, seen from the one that index/ is in

    @staticmethod
    def of(job: str, commits: Mapping[int, Commit], *, path: str = ".") -> IndexedJob:
        return IndexedJob(
            job=job,
            fingerprint=next((commit.fingerprint for commit in commits.values()), ""),
            num_parts=len(commits),
            parts_digest=parts_digest(commits),
            num_vectors=sum(sum(commit.vectors.values()) for commit in commits.values()),
            path=path,
        )

    def directory(self, out: Path) -> Path:
        """The same, absolute and without links, of the index in `out`."""
        return (out / self.path).resolve()


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionNote:
    """What a version of an index was, for people. Search reads nothing of it."""

    version: int
    at: str  # when it came, ISO 8601 with offset
    change: str  # what made it of the version before
    num_vectors: int  # with the deleted
    num_deleted: int
    size_bytes: int  # of its files
    recall: float | None

    @staticmethod
    def of(manifest: IndexManifest, change: str, at: datetime) -> VersionNote:
        return VersionNote(
            version=manifest.version,
            at=at.astimezone().isoformat(timespec="seconds"),
            change=change,
            num_vectors=manifest.num_vectors,
            num_deleted=manifest.num_deleted,
            size_bytes=sum(contents.size_bytes for contents in manifest.files),
            recall=manifest.recall.reached,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexManifest:
    kind: str  # FAISS factory string
    dimension: int
    num_vectors: int
    provenance: Provenance
    shards: tuple[Shard, ...]
    rows: Contents
    jobs: tuple[IndexedJob, ...]
    recall: Recall
    missed: tuple[MissedKind, ...] = ()
    metric: Literal["inner_product"] = "inner_product"
    center: Contents | None = None  # the mean that was taken out of the vectors; queries lose it too
    deleted: Contents | None = None  # the numbers of vectors that are not to be found any more
    version: int = 1  # one more with each change to what the index holds
    history: tuple[VersionNote, ...] = ()  # of the versions up to this one; empty where it is as it was built

    @property
    def files(self) -> tuple[Contents, ...]:
        """All that the index consists of beside index.json."""
        return (self.rows, *(one for one in (self.center, self.deleted) if one is not None), *self.shards)

    @property
    def num_deleted(self) -> int:
        return 0 if self.deleted is None else self.deleted.num_vectors

    @property
    def num_absent(self) -> int:
        """Of the deleted vectors, how many no shard holds any more."""
        return sum(shard.absent for shard in self.shards)

    @property
    def first_vectors(self) -> tuple[int, ...]:
        """The number of each job's first vector."""
        counts = [job.num_vectors for job in self.jobs]
        return tuple(itertools.accumulate(counts[:-1], initial=0)) if counts else ()

    @property
    def digest(self) -> str:
        """Hexadecimal; changes with anything that the manifest says."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> IndexManifest:
        """TypeError or KeyError if it is not the document of a manifest of this format."""
        values = dict(document)
        if values.pop("format") != FORMAT:
            raise TypeError(f"it is of format {document['format']}, not {FORMAT}")
        values["provenance"] = Provenance(**values["provenance"])
        values["shards"] = tuple(_shard(shard) for shard in values["shards"])
        values["rows"] = Contents(**values["rows"])
        for name in ("center", "deleted"):
            values[name] = None if values.get(name) is None else Contents(**values[name])
        values["jobs"] = tuple(IndexedJob(**job) for job in values["jobs"])
        values["recall"] = Recall(**values["recall"])
        values["history"] = tuple(VersionNote(**note) for note in values.get("history", ()))
        values["missed"] = tuple(MissedKind(**missed) for missed in values["missed"])
        return IndexManifest(**values)


def read_manifest(folder: Path) -> IndexManifest:
    """The manifest of the index in `folder`. UserError if there is none, JobError if it is damaged."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise UserError(f"there is no index in {folder.parent}: its job embeds nothing, or is not done yet")
    document = read_sealed(path)
    try:
        manifest = IndexManifest.from_json(document)
    except (TypeError, KeyError, ValueError) as error:
        raise JobError(
            f"{path} is not an index that this version of gristmill reads: {error}; {_UNREADABLE}"
        ) from error
    problem = manifest_problem(manifest)
    if problem is not None:
        raise JobError(f"{path} is not sound: {problem}; {_UNREADABLE}")
    return manifest


def _shard(document: Mapping[str, Any]) -> Shard:
    return Shard(**{**document, "trials": tuple(Trial(**trial) for trial in document["trials"])})


def parts_digest(commits: Mapping[int, Commit]) -> str:
    """Hexadecimal; changes when any part does, or when one is added."""
    digest = hashlib.sha256()
    for split in sorted(commits):
        digest.update(f"{split} {commits[split].sha256}\n".encode())
    return digest.hexdigest()
