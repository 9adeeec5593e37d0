"""extensions.json: which jobs over files that came later belong to a job, so that a look at its input knows the files.

    extensions.json       sealed: {"extensions": [{"path", "job", "files"}, ...]}, in the order in which they were begun
    extensions/000001/    by default the directory of the first of them, a job directory like any other

It is written before the job of an extension is planned. One whose directory has no job.json never began, and counts for
nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.durable import read_sealed, replace_file, seal, storage_errors
from pipeline.errors import JobError, UserError
from pipeline.index.manifest import read_manifest
from pipeline.indexed_jobs import job_folder
from pipeline.job_folder import JobFolder, read_plan

EXTENSIONS_NAME: Final = "extensions.json"
FOLDER_NAME: Final = "extensions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """A job with the settings of another over input files that came later."""

    path: str  # of its directory, seen from the other job's
    job: str  # its name
    files: tuple[str, ...]  # absolute paths and URIs, in row order

    def folder(self, of: JobFolder) -> JobFolder:
        return JobFolder(of.root / self.path)

    def directory(self, of: JobFolder) -> Path:
        """Absolute and without links, as `IndexedJob.directory`."""
        return self.folder(of).root.resolve()

    def began(self, of: JobFolder) -> bool:
        return self.folder(of).job_file.is_file()


def read_extensions(folder: JobFolder) -> tuple[Extension, ...]:
    """Of the job in `folder`; none where the file is not there. JobError if it is damaged."""
    path = folder.root / EXTENSIONS_NAME
    if not path.exists():
        return ()
    try:
        return tuple(_extension(one) for one in read_sealed(path)["extensions"])
    except (KeyError, TypeError) as error:
        raise JobError(f"{path} is not a list of extensions: {error}") from error


def write_extensions(folder: JobFolder, extensions: Iterable[Extension]) -> None:
    """Whoever writes holds the lock of `folder`. JobError where the storage fails."""
    path = folder.root / EXTENSIONS_NAME
    document = {"extensions": [dataclasses.asdict(one) for one in extensions]}
    with storage_errors("writing", path):
        replace_file(path, seal(document), drafts=folder.attempts)


def known_files(folder: JobFolder) -> set[str]:
    """Input files that are not the job's own rows, and are rows of others in its index or to be added to it."""
    known = {file for extension in read_extensions(folder) for file in extension.files}
    try:
        jobs = read_manifest(folder.index).jobs
    except (UserError, JobError):
        return known
    for job in jobs:
        if job.path == ".":
            continue
        try:
            source = read_plan(job_folder(folder.root, job)).get("source", {})
        except JobError:
            continue  # it is gone: whoever needs its rows says so
        known |= {file["path"] for file in source.get("files", ())}
    return known


def free_path(folder: JobFolder, extensions: Sequence[Extension]) -> str:
    """The next directory below OUT/extensions that nothing is in."""
    number = len(extensions) + 1
    while (folder.root / (path := str(Path(FOLDER_NAME, f"{number:06d}")))).exists():
        number += 1
    return path


def _extension(document: dict[str, Any]) -> Extension:
    files = document["files"]
    if not all(isinstance(text, str) for text in (document["path"], document["job"], *files)):
        raise TypeError("a path, a name and files are texts")
    return Extension(path=document["path"], job=document["job"], files=tuple(files))
