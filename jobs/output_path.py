"""An output folder that the next run would read as input."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath

from jobs.spec import JobSpec
from pipeline.errors import UserError
from pipeline.locations import is_uri

_MAGIC = re.compile(r"[*?\[]")


def refuse_output_in_input(spec: JobSpec) -> None:
    """UserError where output.path lies among the input's files, or is the job that is read."""
    output = _absolute(spec.output.path)
    if is_uri(spec.output.path):
        raise UserError(f"output.path {spec.output.path}: output goes to a local or shared filesystem; name a folder")
    if spec.input.job is not None and not is_uri(spec.input.job):
        job = _absolute(spec.input.job)
        if output == job or output.is_relative_to(job):
            raise UserError(
                f"output.path {spec.output.path} is inside the job that is read, {spec.input.job}; name another"
            )
    paths = spec.input.path if isinstance(spec.input.path, tuple) else (spec.input.path,)
    for path in paths:
        if path is not None and not is_uri(path) and _would_read(path, output):
            raise UserError(
                f"output.path {spec.output.path} is inside the input {path}: the next run would read what this one "
                "writes; name another folder"
            )


def _would_read(pattern: str, output: Path) -> bool:
    """Whether the input would hold a part that is written below `output`."""
    part = output / "parts" / "part-000000.parquet"
    absolute = os.path.abspath(os.path.expanduser(pattern))
    literal, *wild = _MAGIC.split(absolute, maxsplit=1)
    if not wild:
        return part.is_relative_to(absolute)
    if "**" in absolute:
        return part.is_relative_to(literal.rpartition("/")[0] or "/")
    depth = len(PurePath(absolute).parts)  # a folder that the glob matches is read too, however deep
    return any(PurePath(*part.parts[:length]).match(absolute) for length in range(depth, len(part.parts) + 1))


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))
