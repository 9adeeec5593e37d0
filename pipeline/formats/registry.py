"""Which format an input has, by the names of its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from pipeline.errors import UserError
from pipeline.formats.arrow_ipc import ArrowFormat
from pipeline.formats.base import Format
from pipeline.formats.delimited import DelimitedFormat
from pipeline.formats.json_lines import JsonLinesFormat
from pipeline.formats.lines import CODECS
from pipeline.formats.parquet import ParquetFormat
from pipeline.formats.plain_text import TextFilesFormat, TextLinesFormat
from pipeline.locations import Found, Place, find_files
from pipeline.suggest import did_you_mean

FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        ParquetFormat(),
        ArrowFormat(),
        JsonLinesFormat(),
        DelimitedFormat(),
        TextLinesFormat(),
        TextFilesFormat(),
    )
}

_BY_SUFFIX = {
    ".parquet": "parquet",
    ".parq": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".arrows": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
}
_COMPRESSIBLE = {"jsonl", "csv", "text"}


def format_of(name: str) -> str | None:
    """The format that a file's name states; `text` for all plain text.

    >>> format_of("corpus.jsonl.gz")
    'jsonl'
    """
    path = PurePosixPath(name.lower())
    if path.suffix in CODECS:
        inner = _BY_SUFFIX.get(PurePosixPath(path.stem).suffix)
        return inner if inner in _COMPRESSIBLE else None
    return _BY_SUFFIX.get(path.suffix)


def list_input(patterns: Sequence[str], format_name: str) -> tuple[Format, list[Place]]:
    """The files of an input, those of each pattern by path, none twice; and their one format.

    With the format `auto` plain text is a row a line in a file that is named by itself, else a row a file.
    """
    if format_name != "auto" and format_name not in FORMATS:
        hint = did_you_mean(format_name, FORMATS)
        raise UserError(f"input.format {format_name!r} is none of {', '.join(FORMATS)}{hint}")
    finds = [find_files(pattern) for pattern in patterns]
    files: dict[str, Place] = {}
    for pattern, found in zip(patterns, finds, strict=True):
        for place in _of_interest(pattern, found, format_name):
            files.setdefault(place.name, place)
    if format_name == "auto":
        format_name = _common_format(list(files.values()))
        if format_name == "text" and len(finds) == 1 and finds[0].named:
            format_name = "lines"
    return FORMATS[format_name], list(files.values())


def _of_interest(pattern: str, found: Found, format_name: str) -> list[Place]:
    """Of a folder's files those that hold the data, not what lies beside them."""
    if not found.in_folder:
        return found.files
    formats = {place.name: format_of(place.path) for place in found.files}
    if format_name == "auto":
        data = [place for place in found.files if formats[place.name] not in (None, "text")]
        data = data or [place for place in found.files if formats[place.name] == "text"]
        if not data:
            raise UserError(
                f"input {pattern}: no file in it has a known ending; say input.format ({', '.join(FORMATS)})"
            )
        return data
    wanted = "text" if format_name == "lines" else format_name
    return [place for place in found.files if formats[place.name] == wanted] or found.files


def _common_format(files: Sequence[Place]) -> str:
    found: Counter[str] = Counter()
    for place in files:
        name = format_of(place.path)
        if name is None:
            names = ", ".join(FORMATS)
            raise UserError(f"input {place.name}: its name does not tell its format; say input.format ({names})")
        found[name] += 1
    if len(found) > 1:
        mixed = " and ".join(f"{count} {name}" for name, count in found.items())
        raise UserError(f"input: holds {mixed} files; name those of one format, or say input.format")
    return next(iter(found))
