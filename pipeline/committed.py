"""The committed parts of another job, as the input of this one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.commits import Commit, read_commits
from pipeline.errors import JobError, UserError
from pipeline.job_folder import JobFolder


def committed_parts(job_dir: str) -> Mapping[str, str]:
    """Path of each committed part, in the order of its splits -> the SHA-256 that its commit states.

    UserError where there is no job, no commit yet, or a committed part is not in its place.
    """
    folder = JobFolder(Path(job_dir))
    if not folder.commits.is_dir():
        raise UserError(f"input.job {job_dir}: not a job directory (it has no commits folder)")
    latest: dict[int, Commit] = {}
    try:
        for commit in read_commits(folder):
            if commit.split not in latest or latest[commit.split].revision < commit.revision:
                latest[commit.split] = commit
    except JobError as error:
        raise UserError(f"input.job {job_dir}: {error}; see gristmill verify") from error
    if not latest:
        raise UserError(f"input.job {job_dir}: has no committed rows yet")
    parts = {str(folder.parts / commit.part): commit.sha256 for _, commit in sorted(latest.items())}
    for path in parts:
        if not Path(path).is_file():
            raise UserError(f"input.job {job_dir}: {Path(path).name} is committed but missing; run that job again")
    return parts
