"""The jobs whose rows an index holds: where their directories are, and the records of what was found.

An index may hold the parts of several jobs. It keeps their vectors; texts and columns stay in each job's own parts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.commits import Commit, read_commits
from pipeline.errors import JobError
from pipeline.found_rows import FoundRow, FoundRows
from pipeline.index.manifest import IndexedJob, IndexManifest
from pipeline.index.row_map import Place
from pipeline.job_folder import JobFolder, read_job


def job_folder(out: Path, job: IndexedJob) -> JobFolder:
    """The directory of one of the jobs of the index in `out`. JobError where it is gone, or another job's by now."""
    folder = JobFolder(out if job.path == "." else out / job.path)
    if not folder.job_file.is_file():
        raise JobError(
            f"the rows of job {job.job!r} are in {folder.root}, and there is no job directory there; put it back, or "
            f"to go on without them: gristmill index delete {out} --filter \"job == '{job.job}'\""
        )
    if read_job(folder)["fingerprint"] != job.fingerprint:
        raise JobError(f"{folder.root} is another job's by now, and the index in {out} holds rows of {job.job!r}")
    return folder


class IndexedRows:
    """Reads the records of what was found, in whichever job's parts they are. Not for several threads at once."""

    def __init__(self, out: Path, manifest: IndexManifest, *, cache_bytes: int = 0) -> None:
        self._out = out
        self._jobs: Mapping[str, IndexedJob] = {job.job: job for job in manifest.jobs}
        self._cache_bytes = cache_bytes // max(len(manifest.jobs), 1)
        self._rows: dict[str, FoundRows] = {}

    def read(self, places: Collection[Place]) -> dict[tuple[str, int, int], FoundRow]:
        """(job, row, sample) -> its record. JobError where a job's directory or a row of it is gone."""
        wanted: dict[str, set[tuple[int, int]]] = defaultdict(set)
        for place in places:
            wanted[place.job].add((place.row, place.sample))
        return {
            (job, *at): record for job, rows in wanted.items() for at, record in self._rows_of(job).read(rows).items()
        }

    def ids(self, places: pa.Table) -> list[str | None]:
        """The id of each record of rows.parquet in `places`, in their order. JobError as `read`."""
        jobs: Any = places["job"].to_pylist()
        rows = places["row"].to_numpy()
        found: list[str | None] = [None] * len(rows)
        for job in dict.fromkeys(jobs):
            mine = np.array([place for place, other in enumerate(jobs) if other == job], np.int64)
            for place, id in zip(mine.tolist(), self._rows_of(job).ids(rows[mine]), strict=True):
                found[place] = id
        return found

    def _rows_of(self, job: str) -> FoundRows:
        if job not in self._rows:
            if job not in self._jobs:
                raise JobError(f"{self._out}: rows.parquet names a job {job!r} that index.json does not; run verify")
            folder = job_folder(self._out, self._jobs[job])
            self._rows[job] = FoundRows(folder.root, cache_bytes=self._cache_bytes)
        return self._rows[job]


def latest_commits(folder: JobFolder) -> dict[int, Commit]:
    """Split -> its latest commit. A controller may be removing one that it replaced: then the list is read again."""
    for attempt in range(3):
        try:
            commits = read_commits(folder)
        except JobError:
            if attempt == 2:
                raise
            continue
        return {commit.split: commit for commit in sorted(commits, key=lambda commit: commit.revision)}
    raise AssertionError
