"""index.json held against itself, before anything that it names is opened.

Its checksum tells damage, not who wrote it: types, names of files and counts are looked at all the same.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import TypeAdapter, ValidationError

if TYPE_CHECKING:
    from pipeline.index.manifest import IndexManifest

_LONGEST_NAME: Final = 63  # whatever its letters take in bytes, a filesystem takes it


def manifest_problem(manifest: IndexManifest) -> str | None:
    """What is of a wrong type, contradicts itself or leads out of the folder; None if nothing does."""
    try:
        _types().validate_json(json.dumps(dataclasses.asdict(manifest)), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
    for contents in manifest.files:
        name = contents.file
        if name != Path(name).name or name in ("", ".", "..") or "\0" in name or len(name) > _LONGEST_NAME:
            return f"{name[:80]!r} is no name of a file in its folder"
        if contents.num_vectors < 0 or contents.size_bytes < 0:
            return f"{contents.file} holds less than nothing"
    if len({contents.file for contents in manifest.files}) < len(manifest.files):
        return "it names a file twice"
    if manifest.dimension < 1:
        return f"no vector has a width of {manifest.dimension}"
    number = 0
    for shard in manifest.shards:
        if shard.first_vector != number:
            return f"{shard.file} begins with vector {shard.first_vector}, not {number}"
        if not 0 <= shard.absent <= shard.num_vectors:
            return f"{shard.file} lacks {shard.absent} of {shard.num_vectors} vectors"
        number += shard.num_vectors
    for counted, what in ((number, "shards"), (manifest.rows.num_vectors, manifest.rows.file)):
        if counted != manifest.num_vectors:
            return f"its {what} have {counted} of {manifest.num_vectors} vectors"
    return _jobs_problem(manifest)


def _jobs_problem(manifest: IndexManifest) -> str | None:
    """A job's directory may be anywhere, by a path from here; job.json in it has to say that it is that job's."""
    for job in manifest.jobs:
        if not job.path or os.path.isabs(job.path) or "\0" in job.path:
            return f"{job.path[:80]!r} is no path from here to the directory of job {job.job[:80]!r}"
        if job.num_vectors < 0 or job.num_parts < 0:
            return f"it holds less than nothing of job {job.job!r}"
    if len({job.job for job in manifest.jobs}) < len(manifest.jobs):
        return "it calls two jobs by one name"
    held = sum(job.num_vectors for job in manifest.jobs)
    if held != manifest.num_vectors or not manifest.jobs:
        return f"its jobs have {held} of {manifest.num_vectors} vectors"
    if manifest.num_deleted > manifest.num_vectors:
        return f"{manifest.num_deleted} of its {manifest.num_vectors} vectors were deleted"
    if manifest.num_absent > manifest.num_deleted:
        return f"its shards lack {manifest.num_absent} vectors, and {manifest.num_deleted} were deleted"
    return None


@functools.cache
def _types() -> TypeAdapter[Any]:
    from pipeline.index.manifest import IndexManifest  # which asks this module

    return TypeAdapter(IndexManifest)
