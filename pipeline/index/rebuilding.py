"""What an index holds beside its first job, carried over where that has to be indexed anew.

A job whose parts changed (a limit was lifted, failed rows were tried again) builds its index again. What was added to
it and deleted from it since belongs to the person who did so, and is done again on the new index before it takes the
old one's place.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import JobError, UserError
from pipeline.index.builders import Builders
from pipeline.index.deletions import DELETED_NAME, delete_vectors, is_all_deleted, read_deleted
from pipeline.index.faiss_files import check_file
from pipeline.index.growth import Addition, add_job
from pipeline.index.kinds import DEFAULT_MEMORY_BYTES
from pipeline.index.manifest import MANIFEST_NAME, ROWS_NAME, IndexedJob, IndexManifest, read_manifest
from pipeline.index.row_map import SCHEMA, RowMap
from pipeline.index.versions import VERSIONS_NAME, Change, versions_present, with_history
from pipeline.indexed_jobs import job_folder, latest_commits
from pipeline.job_folder import JobFolder


def kept_changes(
    folder: JobFolder, *, memory_bytes: int = DEFAULT_MEMORY_BYTES, builders: Builders | None = None
) -> Change | None:
    """What was added to `index/` and deleted from it, as a change to an index that is to take its place.

    That becomes the version after it. None where there is no index, or one that can't be read and is as it was built.
    JobError where a job that was added is gone, or files are that say what was added and deleted. `memory_bytes` and
    `builders` as `add_job` has them.
    """
    try:
        before = read_manifest(folder.index)
    except (UserError, JobError) as error:
        if not _may_be_changed(folder):
            return None
        raise _unknown_changes(folder, MANIFEST_NAME) from error
    try:
        deleted = read_deleted(folder.index, before)
    except JobError as error:
        raise _unknown_changes(folder, DELETED_NAME) from error
    added = [
        (job, job_folder(folder.root, job))
        for job, first in list(zip(before.jobs, before.first_vectors, strict=True))[1:]
        if not (is_all_deleted(deleted, first, job.num_vectors) and not _is_there(folder, job))
    ]
    gone = SCHEMA.empty_table()
    if deleted is not None:
        try:
            gone = RowMap(check_file(folder.index, before.rows)).table(deleted)
        except JobError as error:
            raise _unknown_changes(folder, ROWS_NAME) from error

    def change(draft: Path, manifest: IndexManifest) -> IndexManifest:
        manifest = _without(draft, manifest, gone, before.jobs[0].job)
        for job, its_folder in added:
            commits = latest_commits(its_folder)
            addition = Addition(
                folder=its_folder, path=job.path, job=job.job, commits=commits, provenance=manifest.provenance
            )
            manifest = add_job(draft, manifest, addition, memory_bytes=memory_bytes, builders=builders)
            manifest = _without(draft, manifest, gone, job.job)  # now: the same job may follow once more
        manifest = dataclasses.replace(manifest, version=before.version + 1)
        return with_history(manifest, before, folder.index, f"built again, as {manifest.kind}")

    return change


def _may_be_changed(folder: JobFolder) -> bool:
    """Of an index that no index.json tells of: whether something may have been added to it or deleted from it.

    A change keeps the version before it, which may have been removed since; what it deleted has a file of its own, and
    what it added another job's name in rows.parquet.
    """
    versions = folder.root / VERSIONS_NAME
    if (versions.is_dir() and os.listdir(versions)) or (folder.index / DELETED_NAME).exists():
        return True
    if not folder.index.is_dir() or not os.listdir(folder.index):
        return False
    jobs = set[str | None]()
    try:
        with pq.ParquetFile(folder.index / ROWS_NAME) as file:
            for batch in file.iter_batches(columns=["job"]):
                jobs.update(pc.unique(batch["job"]).to_pylist())
    except (pa.ArrowException, OSError):
        return True
    return len(jobs) > 1


def _unknown_changes(folder: JobFolder, name: str) -> JobError:
    """`name`: the file of the index that would say what was added or deleted."""
    kept = [path for path, _ in versions_present(folder.index) if path != folder.index]
    before = f", or have {kept[0]}, the version before, take the place of {folder.index}" if kept else ""
    return JobError(
        f"{folder.index / name} is missing or can't be read: what was added to the index and deleted from it would be "
        f"lost. Put the file back{before}, or remove index/ and index-versions/ to have an index of this job's rows "
        "alone; then run again"
    )


def _is_there(folder: JobFolder, job: IndexedJob) -> bool:
    try:
        job_folder(folder.root, job)
    except JobError:
        return False
    return True


def _without(draft: Path, manifest: IndexManifest, gone: pa.Table, called: str) -> IndexManifest:
    """The last job of `manifest` loses those of its rows that are `gone`, where the job was `called` so."""
    mine = gone.filter(pc.field("job") == called).drop_columns(["vector", "job"])
    if not mine.num_rows:
        return manifest
    first = manifest.first_vectors[-1]
    found = [np.empty(0, np.int64)]
    with pq.ParquetFile(draft / ROWS_NAME) as file:
        for batch in file.iter_batches():
            places = pa.Table.from_batches([batch]).filter(pc.field("vector") >= first)
            found.append(places.join(mine, mine.column_names, join_type="left semi")["vector"].to_numpy())
    return delete_vectors(draft, manifest, np.sort(np.concatenate(found)))
