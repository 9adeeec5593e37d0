"""The files of one version of an index, read wherever they are by now: a reader is not disturbed by the next change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.errors import JobError, UserError
from pipeline.index.manifest import IndexManifest, read_manifest
from pipeline.index.versions import folder_of_version

T = TypeVar("T")


def read_version(folder: Path, manifest: IndexManifest, read: Callable[[Path], T]) -> T:
    """`read` of the folder that has the files of this version of the index in `folder` (OUT/index).

    JobError as `read` raises it, or where the version was replaced twice, so that its files are gone.
    """
    where = folder_of_version(folder, manifest)
    while True:
        try:
            return read(where)
        except JobError as error:
            before, where = where, folder_of_version(folder, manifest)
            if _is_another(where, manifest):
                raise JobError(
                    f"version {manifest.version} of the index in {folder} was replaced more than once and is not there "
                    "any more; ask again in a moment"
                ) from error
            if where == before:
                raise


def _is_another(folder: Path, manifest: IndexManifest) -> bool:
    try:
        return read_manifest(folder) != manifest
    except (UserError, JobError):  # gone, or damaged: that is to be said
        return False
