"""What an index holds beside its first job, carried over where that has to be indexed anew.

A job whose parts changed (a limit was lifted, failed rows were tried again) builds its index again. What was added to
it and deleted from it since belongs to the person who did so, and is done again on the new index before it takes the
old one's place.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipeline.errors import JobError, UserError
from pipeline.index.deletions import Numbers, delete_vectors, read_deleted
from pipeline.index.faiss_files import check_file
from pipeline.index.growth import Addition, add_job
from pipeline.index.manifest import ROWS_NAME, IndexManifest, read_manifest
from pipeline.index.row_map import Place, RowMap
from pipeline.index.versions import Change
from pipeline.indexed_jobs import job_folder, latest_commits
from pipeline.job_folder import JobFolder


def kept_changes(folder: JobFolder) -> Change | None:
    """What was added to `index/` and deleted from it, as a change to an index that is to take its place.

    None where there is nothing of the kind, or no index that can be read. JobError where a job that was added is gone.
    """
    try:
        before = read_manifest(folder.index)
    except (UserError, JobError):
        return None
    if len(before.jobs) == 1 and before.deleted is None:
        return None
    added = [(job, job_folder(folder.root, job)) for job in before.jobs[1:]]
    gone = _deleted_places(folder.index, before)

    def change(draft: Path, manifest: IndexManifest) -> IndexManifest:
        for job, its_folder in added:
            commits = latest_commits(its_folder)
            addition = Addition(
                folder=its_folder, path=job.path, job=job.job, commits=commits, provenance=manifest.provenance
            )
            manifest = add_job(draft, manifest, addition)
        if gone:
            manifest = delete_vectors(draft, manifest, _numbers_of(draft / ROWS_NAME, gone))
        return dataclasses.replace(manifest, version=before.version + 1)

    return change


def _deleted_places(folder: Path, manifest: IndexManifest) -> set[Place]:
    numbers = read_deleted(folder, manifest)
    if numbers is None:
        return set()
    return set(RowMap(check_file(folder, manifest.rows)).places(numbers))


def _numbers_of(path: Path, places: set[Place]) -> Numbers:
    found: list[int] = []
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            for record in batch.to_pylist():
                if Place(record["job"], record["row"], record["sample"], record["field"]) in places:
                    found.append(record["vector"])
    return np.array(found, np.int64)
