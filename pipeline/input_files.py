"""The files of an input: what they are when a job is planned, and what is another about them later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from pipeline.committed import committed_parts
from pipeline.digests import digest_of
from pipeline.errors import UserError, one_line
from pipeline.formats.base import FileScan, Format, InputFile, ScanLimits
from pipeline.formats.registry import FORMATS, list_input
from pipeline.locations import Place, locate

_HASHED_TOTAL_BYTES = 8 << 30  # a larger input is known by sizes and times: hashing takes a second for each GiB
_TOTAL_MARKS = 1 << 23  # positions remembered in files without an index of their own, 8 bytes each
_TOTAL_SAMPLE_ROWS = 20_000
_NUM_THREADS = 8

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def list_files(patterns: Sequence[str], job: str | None, format: str) -> tuple[Format, list[Place]]:
    """The files that an input means, in their order, and their format. UserError where it means none."""
    if job is not None:
        return FORMATS["parquet"], [locate(path) for path in committed_parts(job)]
    return list_input(patterns, format)


def scan_files(format: Format, places: Sequence[Place], job: str | None) -> list[tuple[InputFile, FileScan]]:
    """A look at each file, several at once. UserError for one that can't be read, or is not what its job committed."""
    limits = ScanLimits(
        max_marks=min(1 << 17, _TOTAL_MARKS // len(places)),
        sample_rows=max(20, min(2000, _TOTAL_SAMPLE_ROWS // len(places))),
    )
    total_bytes = sum(int(place.info().size or 0) for place in places)
    hashed = all(place.is_local for place in places) and total_bytes <= _HASHED_TOTAL_BYTES
    looked = _in_threads(lambda place: _look(format, place, limits, hashed), places)
    if job is not None and hashed:
        _refuse_altered_parts(job, [file for file, _ in looked])
    return looked


def change_among(planned: Sequence[InputFile], places: Sequence[Place]) -> str | None:
    """What is another about files than when the job was planned, in a line: gone or changed."""
    return next(iter(changes_among(planned, places).values()), None)


def changes_among(planned: Sequence[InputFile], places: Sequence[Place]) -> dict[str, str]:
    """The same of each file about which anything is another, by path; those that are gone first."""
    found = {place.name: place for place in places}
    gone = sorted({file.path for file in planned} - found.keys())
    there = [file for file in planned if file.path in found]
    changes = _in_threads(lambda file: change_of(file, found[file.path], thorough=True), there)
    return {path: f"input {path} is gone since the job was planned" for path in gone} | {
        file.path: change for file, change in zip(there, changes, strict=True) if change is not None
    }


def change_of(file: InputFile, place: Place, *, thorough: bool) -> str | None:
    """What is another in a file than at planning, in a line. Its bytes are hashed only where `thorough`."""
    info = place.info()
    if info.type != fs.FileType.File:
        return f"input {file.path} is gone since the job was planned"
    if info.size != file.size_bytes:
        return f"input {file.path} has changed since the job was planned: {file.size_bytes} bytes then, {info.size} now"
    hashed = file.digest.startswith("sha256:")
    if hashed and not thorough:
        return None
    try:
        digest = digest_of(place, hashed=hashed)
    except (OSError, pa.ArrowException) as error:
        return f"input {file.path}: {one_line(error)}"
    if digest == file.digest:
        return None
    what = "its bytes are others (same size)" if hashed else "its time of modification is another"
    return f"input {file.path} has changed since the job was planned: {what}"


def _look(format: Format, place: Place, limits: ScanLimits, hashed: bool) -> tuple[InputFile, FileScan]:
    scan = format.scan(place.name, limits)
    try:
        digest = digest_of(place, hashed=hashed)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"input {place.name}: {one_line(error)}") from error
    size = int(place.info().size or 0)
    return InputFile(path=place.name, size_bytes=size, num_rows=scan.num_rows, digest=digest), scan


def _refuse_altered_parts(job: str, files: Sequence[InputFile]) -> None:
    committed: Mapping[str, str] = committed_parts(job)
    for file in files:
        if file.digest != f"sha256:{committed[file.path]}":
            raise UserError(f"input.job {job}: {file.path} is not what was committed; see gristmill verify {job}")


def _in_threads(work: Callable[[_In], _Out], items: Sequence[_In]) -> list[_Out]:
    """`work` of each item, in their order; the first exception in that order is raised."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(_NUM_THREADS, len(items))) as threads:
        return list(threads.map(work, items))
