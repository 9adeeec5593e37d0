"""`gristmill index ...`: what changes an index after its job is done, each time as a version of its own."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from jobs.embedding import job_provenance
from jobs.spec import JobSpec, parse_size
from jobs.status import open_index, open_job
from jobs.terminal import human_bytes
from pipeline.errors import JobError, UserError, one_line
from pipeline.index.check import IndexedParts, is_of_these_parts
from pipeline.index.compaction import compact, planned_ranges
from pipeline.index.deletions import delete_vectors, is_all_deleted, read_deleted
from pipeline.index.expression import Filter
from pipeline.index.growth import Addition, add_job
from pipeline.index.kinds import DEFAULT_MEMORY_BYTES
from pipeline.index.manifest import MANIFEST_NAME, IndexedJob, IndexManifest, Provenance, VersionNote, read_manifest
from pipeline.index.matching import OfIds, Wanted, matching_vectors
from pipeline.index.merging import merge_indexes
from pipeline.index.selection import Mask
from pipeline.index.versions import change_index, kept_folder
from pipeline.indexed_jobs import job_folder, latest_commits
from pipeline.job_folder import JobFolder, read_job, read_plan
from pipeline.lock import lock
from pipeline.model_path import resolve_model
from pipeline.suggest import did_you_mean
from workers.index_builders import builders_at_hand


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How shards are built; None is as the job of the index has it."""

    memory_bytes: int | None = None
    threads: int | None = None  # of FAISS

    @staticmethod
    def parse(memory: str | None, threads: int | None) -> BuildOptions:
        """`memory`: a size such as 2GiB. UserError where it is none."""
        given = None if memory is None else parse_size("--memory", int(memory) if memory.isdecimal() else memory)
        return BuildOptions(memory_bytes=given, threads=threads)

    def arguments(self, folder: JobFolder) -> dict[str, Any]:
        """For `add_job` or `compact` of the index in `folder`."""
        memory_bytes, labels = self.memory_bytes, dict[str, str]()
        if folder.job_file.is_file():
            spec = JobSpec.model_validate(read_job(folder)["spec"])
            labels = spec.cluster.labels
            if memory_bytes is None and spec.index is not None and spec.index.memory_bytes != "auto":
                memory_bytes = spec.index.memory_bytes
        return {
            "memory_bytes": memory_bytes or DEFAULT_MEMORY_BYTES,
            "threads": self.threads,
            "builders": None if self.threads is not None else builders_at_hand(labels),
        }


def add_to_index(out: Path, other: Path, options: BuildOptions | None = None) -> IndexManifest:
    """Adds the rows of the finished job in `other` to the index in `out`. UserError where that can't be."""
    with _changing(out) as folder:
        arguments = (options or BuildOptions()).arguments(folder)
        read_manifest(folder.index)
        source = open_job(other)
        spec = JobSpec.model_validate(read_job(source)["spec"])
        if spec.embed is None:
            raise UserError(f"{other} holds no embeddings to add: its job has no `embed`")
        commits = latest_commits(source)
        planned = sum(split["num_rows"] for split in read_plan(source)["splits"])
        if sum(commit.rows for commit in commits.values()) < planned:
            raise UserError(f"{other} is not done yet: run its job to the end, then add it")
        addition = Addition(
            folder=source,
            path=os.path.relpath(other.resolve(), folder.root.resolve()),
            job=spec.name,
            commits=commits,
            provenance=_provenance(source, spec),
        )
        return change_index(folder, lambda draft, manifest: add_job(draft, manifest, addition, **arguments))


def delete_from_index(
    out: Path, *, filter: str | None = None, ids: Sequence[str] = (), job: str | None = None
) -> tuple[IndexManifest, int]:
    """Has the index never find these rows again. The index as it is then, and how many vectors were deleted.

    With `job` only rows of that one. Where ids are row numbers, which every job has, and there are several jobs, it is
    to be said. Where nothing is deleted the index is left alone.
    """
    if (filter is None) == (not ids):
        raise UserError("index delete: say which rows, by --filter or by their ids")
    wanted: Wanted = OfIds(ids) if filter is None else Filter.parse(filter)
    with _changing(out) as folder:
        manifest = read_manifest(folder.index)
        deleted = read_deleted(folder.index, manifest)
        if job is None and ids:
            _refuse_row_numbers(folder, manifest, deleted)
        mask = matching_vectors(folder.index, manifest, wanted, lambda one: job_folder(folder.root, one))
        if job is not None:
            mask &= _numbers_of_job(manifest, job)
        if deleted is not None:
            mask[deleted] = False
        numbers = np.flatnonzero(mask)
        if not len(numbers):
            return manifest, 0
        return change_index(folder, lambda draft, before: delete_vectors(draft, before, numbers)), len(numbers)


def _refuse_row_numbers(folder: JobFolder, manifest: IndexManifest, deleted: Any) -> None:
    standing = [
        job
        for job, first in zip(manifest.jobs, manifest.first_vectors, strict=True)
        if not is_all_deleted(deleted, first, job.num_vectors)
    ]
    if len(standing) > 1:
        for job in standing:
            if read_job(job_folder(folder.root, job))["spec"].get("input", {}).get("id") is None:
                raise UserError(
                    f"index delete: the ids of job {job.job!r} are its row numbers, and other jobs have such rows too; "
                    f"say whose are meant by --job: {', '.join(one.job for one in standing)}"
                )


def _numbers_of_job(manifest: IndexManifest, name: str) -> Mask:
    mask = np.zeros(manifest.num_vectors, np.bool_)
    for job, first in zip(manifest.jobs, manifest.first_vectors, strict=True):
        if job.job == name:
            mask[first : first + job.num_vectors] = True
            return mask
    names = [job.job for job in manifest.jobs]
    raise UserError(f"--job {name}: the index has no such job{did_you_mean(name, names)}; it has {', '.join(names)}")


def compact_index(out: Path, options: BuildOptions | None = None) -> tuple[IndexManifest, IndexManifest]:
    """Builds again what holds deleted vectors, and joins small shards that were added. The index before and after: the
    same where there is nothing to compact. JobError where rows that it holds are gone or others by now."""
    with _changing(out) as folder:
        arguments = (options or BuildOptions()).arguments(folder)
        manifest = read_manifest(folder.index)
        deleted = read_deleted(folder.index, manifest)
        ranges = planned_ranges(manifest, deleted, memory_bytes=arguments["memory_bytes"])
        if all(one.kept is not None for one in ranges):
            return manifest, manifest
        parts = [
            IndexedParts(folder, None) if is_all_deleted(deleted, first, job.num_vectors) else _parts_of(folder, job)
            for job, first in zip(manifest.jobs, manifest.first_vectors, strict=True)
        ]
        return manifest, change_index(folder, lambda draft, before: compact(draft, before, parts, **arguments))


def _parts_of(folder: JobFolder, job: IndexedJob) -> IndexedParts:
    its = job_folder(folder.root, job)
    commits = latest_commits(its)
    if not is_of_these_parts(job, commits):
        raise JobError(
            f"the parts in {its.root} are others than those that the index holds as {job.job!r}; "
            f"`gristmill verify {folder.root}` says what is to be done"
        )
    return IndexedParts(its, commits)


def merge_into(out: Path, sources: Sequence[Path]) -> IndexManifest:
    """Joins the indexes of `sources` in the new directory `out`."""
    if len(sources) < 2:
        raise UserError("index merge: name at least two directories whose indexes are to be merged")
    folders = [open_index(source) for source in sources]
    return merge_indexes(JobFolder(out), folders)


def index_contents(out: Path) -> dict[str, Any]:
    """What the index in `out` holds: {"version", "kind", "vectors", "deleted", "bytes", "recall", "jobs", ...}."""
    folder = open_index(out)
    manifest = read_manifest(folder.index)
    deleted = read_deleted(folder.index, manifest)
    jobs = []
    for job, first in zip(manifest.jobs, manifest.first_vectors, strict=True):
        gone = 0
        if deleted is not None:
            low, high = np.searchsorted(deleted, (first, first + job.num_vectors))
            gone = int(high - low)
        jobs.append({"job": job.job, "path": job.path, "vectors": job.num_vectors, "deleted": gone})
    now = index_history(out)[-1]
    return {
        "version": manifest.version,
        "changed_at": now["at"],
        "change": now["change"],
        "kind": manifest.kind,
        "dimension": manifest.dimension,
        "vectors": manifest.num_vectors,
        "deleted": manifest.num_deleted,
        "deleted_held": manifest.num_deleted - manifest.num_absent,
        "shards": len(manifest.shards),
        "bytes": now["size_bytes"],
        "recall": manifest.recall.reached,
        "recall_target": manifest.recall.target,
        "jobs": jobs,
    }


def describe_contents(found: dict[str, Any]) -> str:
    recall = "" if found["recall"] is None else f", recall {found['recall']:.3f}"
    lines = [
        f"version {found['version']}: {found['vectors']:,} vectors of {found['dimension']}, {found['kind']} in "
        f"{found['shards']:,} {'shard' if found['shards'] == 1 else 'shards'}"
        + (f", {found['deleted']:,} of them deleted" if found["deleted"] else "")
        + (f" ({found['deleted_held']:,} still take up space)" if found["deleted_held"] else "")
        + f", {human_bytes(found['bytes'])}{recall}",
        f"  since {found['changed_at']}: {found['change']}",
    ]
    for job in found["jobs"]:
        gone = f", {job['deleted']:,} of them deleted" if job["deleted"] else ""
        where = "" if job["path"] == "." else f", rows in {job['path']}"
        lines.append(f"  {job['job']}: {job['vectors']:,} vectors{gone}{where}")
    return "\n".join(lines)


def index_history(out: Path) -> list[dict[str, Any]]:
    """The versions of the index in `out`, the oldest first, and whether the files of each are still there."""
    folder = open_index(out)
    manifest = read_manifest(folder.index)
    built_at = datetime.fromtimestamp((folder.index / MANIFEST_NAME).stat().st_mtime)
    history = manifest.history or (VersionNote.of(manifest, "built", built_at),)
    return [dataclasses.asdict(note) | {"kept": _is_kept(folder, note, manifest)} for note in history]


def _is_kept(folder: JobFolder, note: VersionNote, manifest: IndexManifest) -> bool:
    return note.version == manifest.version or (kept_folder(folder, note.version) / MANIFEST_NAME).is_file()


def describe_history(history: list[dict[str, Any]]) -> str:
    lines = []
    for note in history:
        gone = f", {note['num_deleted']:,} of them deleted" if note["num_deleted"] else ""
        recall = "" if note["recall"] is None else f", recall {note['recall']:.3f}"
        kept = "" if note["kept"] else " (its files are gone)"
        lines.append(
            f"{note['version']:>3}  {note['at']}  {note['change']}: {note['num_vectors']:,} vectors{gone}, "
            f"{human_bytes(note['size_bytes'])}{recall}{kept}"
        )
    return "\n".join(lines)


def read_ids(file: Path) -> list[str]:
    """One id a line; of what ends lines in Unicode only newlines do. UserError where there is no such file, or no id
    in it."""
    try:
        lines = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--ids {file}: can't be read ({one_line(error)})") from None
    ids = [line for line in lines if line]
    if not ids:
        raise UserError(f"--ids {file}: it holds no id")
    return ids


@contextmanager
def _changing(out: Path) -> Iterator[JobFolder]:
    folder = open_index(out)
    with lock(folder):
        yield folder


def _provenance(folder: JobFolder, spec: JobSpec) -> Provenance:
    """As the job's own index has it, or where it made none, from its model."""
    if (folder.index / MANIFEST_NAME).is_file():
        return read_manifest(folder.index).provenance
    return job_provenance(spec, model_files=read_job(folder)["covers"]["model"], model_path=resolve_model(spec.model))
