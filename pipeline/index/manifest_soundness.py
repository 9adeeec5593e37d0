"""index.json held against itself, before anything that it names is opened.

Its checksum tells damage, not who wrote it: types, names of files and counts are looked at all the same.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

if TYPE_CHECKING:
    from pipeline.index.manifest import IndexManifest


def manifest_problem(manifest: IndexManifest) -> str | None:
    """What is of a wrong type, contradicts itself or leads out of the folder; None if nothing does."""
    try:
        _types().validate_json(json.dumps(dataclasses.asdict(manifest)), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
    for contents in manifest.files:
        if contents.file != Path(contents.file).name or contents.file in ("", ".", "..") or "\0" in contents.file:
            return f"{contents.file[:80]!r} is no name of a file in its folder"
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
        number += shard.num_vectors
    for counted, what in ((number, "shards"), (manifest.rows.num_vectors, manifest.rows.file)):
        if counted != manifest.num_vectors:
            return f"its {what} have {counted} of {manifest.num_vectors} vectors"
    return None


@functools.cache
def _types() -> TypeAdapter[Any]:
    from pipeline.index.manifest import IndexManifest  # which asks this module

    return TypeAdapter(IndexManifest)
