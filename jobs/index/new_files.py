"""Which files of a job's input are rows of no job of its index yet: what `gristmill index extend` takes in.

Known files must be as they were, but those that the index finds no row of any more: who deleted a file's rows is done
with it. It may be gone, and where it is another by now it is new.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import JobError
from pipeline.extensions import Extension
from pipeline.index import faiss_files
from pipeline.index.deletions import is_all_deleted, read_deleted
from pipeline.index.manifest import IndexedJob, IndexManifest
from pipeline.index.row_map import RowMap
from pipeline.indexed_jobs import job_folder
from pipeline.input_files import changes_among
from pipeline.job_folder import JobFolder, read_plan
from pipeline.source import Source


def new_files(
    folder: JobFolder, manifest: IndexManifest, extensions: Sequence[Extension], *, waiting: Collection[Path]
) -> list[str]:
    """What no job of the index, and none of `extensions`, has read, by path. JobError where a known file is another.

    `waiting`: directories of extensions that are not whole in the index yet, whose files are all to be as they were.
    """
    own = folder.root.resolve()
    ours = {one.directory(folder): one for one in extensions}
    known = set[str]()
    jobs = {own: _source(folder)}
    jobs |= {directory: _source(one.folder(folder)) for directory, one in ours.items() if one.began(folder)}
    deleted = read_deleted(folder.index, manifest)
    for job, first in zip(manifest.jobs, manifest.first_vectors, strict=True):
        directory = job.directory(folder.root)
        if is_all_deleted(deleted, first, job.num_vectors) and not directory.is_dir():
            known |= set(ours[directory].files) if directory in ours else set()
        elif directory not in jobs:
            jobs[directory] = _source(job_folder(folder.root, job))
    places = jobs[own].listed()
    listed = {place.name for place in places}
    for directory, source in jobs.items():
        is_ours = directory == own or directory in ours
        mine = source.files if is_ours else [file for file in source.files if file.path in listed]
        changes = changes_among(mine, places)
        known |= {file.path for file in mine if file.path not in changes}
        if changes:
            must_be_whole = directory == own or directory in waiting
            _refuse(folder, manifest, directory, source, changes, must_be_whole=must_be_whole)
    return [place.name for place in places if place.name not in known]


def _source(folder: JobFolder) -> Source:
    return Source.from_json(read_plan(folder)["source"])


def _refuse(
    folder: JobFolder,
    manifest: IndexManifest,
    directory: Path,
    source: Source,
    changes: Mapping[str, str],
    *,
    must_be_whole: bool,
) -> None:
    """JobError for the first of the job's changed files that the index still finds a row of. `must_be_whole`: where it
    holds none of the job yet, for the first of all."""
    jobs = [
        (job, first)
        for job, first in zip(manifest.jobs, manifest.first_vectors, strict=True)
        if job.directory(folder.root) == directory
    ]
    if not jobs:
        if must_be_whole:
            raise JobError(next(iter(changes.values())))
        return  # its job is done and had no vectors
    for job, first_vector in jobs:  # of which the last has rows, where it was added anew
        rows = _standing_rows(folder, manifest, job, first_vector)
        end = 0
        for file in source.files:
            first, end = end, end + file.num_rows
            if file.path in changes and ((first <= rows) & (rows < end)).any():
                raise JobError(
                    f"{changes[file.path]}; put it back, or to go on without its rows: gristmill index delete "
                    f"{folder.root} --filter \"job == '{job.job}' and {first} <= row < {end}\""
                )


def _standing_rows(
    folder: JobFolder, manifest: IndexManifest, job: IndexedJob, first_vector: int
) -> npt.NDArray[np.int64]:
    """The rows of the job that the index finds, once for each of their vectors."""
    deleted = read_deleted(folder.index, manifest)
    numbers = np.arange(first_vector, first_vector + job.num_vectors)
    standing = numbers if deleted is None else np.setdiff1d(numbers, deleted, assume_unique=True)
    rows = RowMap(faiss_files.check_file(folder.index, manifest.rows))
    found: npt.NDArray[np.int64] = rows.table(standing)["row"].to_numpy()
    return found
