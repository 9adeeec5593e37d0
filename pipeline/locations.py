"""Paths, folders, globs and URIs -> the files they mean, in a fixed order, through pyarrow.fs."""

from __future__ import annotations

import fnmatch
import functools
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import UserError, one_line

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_QUERY = re.compile(r"\?(?=[A-Za-z_]+=)")  # `?region=eu` is a query, `?` elsewhere a wildcard
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Place:
    """A file or folder: the filesystem it is on and its path there. `name` is how people write it."""

    filesystem: fs.FileSystem
    path: str
    name: str

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def info(self) -> fs.FileInfo:
        return self.filesystem.get_file_info(self.path)

    def sibling(self, path: str) -> Place:
        """Another path on the same filesystem."""
        if self.is_local:
            return Place(self.filesystem, path, path)
        scheme, authority, _, query = _parts(self.name)
        inner = path.removeprefix(_remote_root(scheme, authority, query)[1])
        return Place(self.filesystem, path, _uri(scheme, authority, quote("/" + inner.lstrip("/")), query))


def locate(path: str) -> Place:
    """The place that `path` names: a URI, or a local path, relative ones from the current directory."""
    if not is_uri(path):
        absolute = os.path.abspath(os.path.expanduser(path))
        return Place(_local(), absolute, absolute)
    scheme, authority, inner, query = _parts(path)
    if scheme == "file":
        return Place(_local(), unquote(inner), unquote(inner))
    filesystem, root = _remote_root(scheme, authority, query)
    inner = unquote(inner).lstrip("/")
    return Place(filesystem, root + inner, _uri(scheme, authority, quote("/" + inner), query))


def is_uri(path: str) -> bool:
    return _URI.match(path) is not None


@dataclass(frozen=True, slots=True)
class Found:
    """Files, by path. `named`: the one file was named itself, not found in a folder or by a glob."""

    files: list[Place]
    named: bool
    in_folder: bool


def find_files(pattern: str) -> Found:
    """The files that a path, folder or glob means; of a folder all that lie in it, however deep.

    In folders, names that start with `_` or `.` are passed over, as pyarrow.dataset does. UserError if none is left.
    """
    place = locate(pattern)
    try:
        info = place.info()
        if info.type == fs.FileType.File:
            return Found([place], named=True, in_folder=False)
        if info.type == fs.FileType.Directory:
            found = sorted(_walk(place.filesystem, place.path))
            if not found:
                raise UserError(f"input {pattern}: the folder holds no files")
        elif _MAGIC.search(place.path):
            found = sorted(set(_glob(place)))
            if not found:
                raise UserError(f"input {pattern}: no file matches")
        else:
            raise UserError(f"input {pattern}: no such file or folder")
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"input {pattern}: {one_line(error)}") from error
    return Found([place.sibling(path) for path in found], named=False, in_folder=info.type == fs.FileType.Directory)


def _walk(filesystem: fs.FileSystem, folder: str) -> Iterator[str]:
    for below in _folders(filesystem, folder, ("_", ".")):
        yield from _files(filesystem, below, ("_", "."))


def _files(filesystem: fs.FileSystem, folder: str, hidden: str | tuple[str, ...]) -> Iterator[str]:
    for entry in filesystem.get_file_info(fs.FileSelector(folder)):
        if entry.type == fs.FileType.File and not entry.base_name.startswith(hidden):
            yield entry.path


def _folders(filesystem: fs.FileSystem, folder: str, hidden: str | tuple[str, ...]) -> Iterator[str]:
    """The folder and all below it. A link to a folder that it lies in itself is not followed."""
    waiting: list[tuple[str, frozenset[str]]] = [(folder, frozenset())]
    while waiting:
        folder, within = waiting.pop()
        if isinstance(filesystem, fs.LocalFileSystem):
            real = os.path.realpath(folder)
            if real in within:
                continue
            within |= {real}
        yield folder
        for entry in filesystem.get_file_info(fs.FileSelector(folder)):
            if entry.type == fs.FileType.Directory and not entry.base_name.startswith(hidden):
                waiting.append((entry.path, within))


def _glob(place: Place) -> Iterator[str]:
    segments = place.path.split("/")
    literal = next(i for i, segment in enumerate(segments) if _MAGIC.search(segment))
    folder = "/".join(segments[:literal]) or "/"
    if place.filesystem.get_file_info(folder).type == fs.FileType.Directory:
        yield from _match(place.filesystem, folder, segments[literal:])


def _match(filesystem: fs.FileSystem, folder: str, segments: Sequence[str]) -> Iterator[str]:
    """The files below the folder that a path's segments match; a folder that they match stands for what is in it."""
    first, rest = segments[0], segments[1:]
    if first == "**":
        for below in _folders(filesystem, folder, "."):
            yield from _match(filesystem, below, rest) if rest else _files(filesystem, below, ".")
        return
    if _MAGIC.search(first):
        entries = [
            entry
            for entry in filesystem.get_file_info(fs.FileSelector(folder))
            if fnmatch.fnmatchcase(entry.base_name, first)
            and (first.startswith(".") or not entry.base_name.startswith("."))
        ]
    else:
        entries = [filesystem.get_file_info(posixpath.join(folder, first))]
    for entry in entries:
        if entry.type == fs.FileType.File and not rest:
            yield entry.path
        elif entry.type == fs.FileType.Directory:
            yield from _match(filesystem, entry.path, rest) if rest else _walk(filesystem, entry.path)


@functools.cache
def _local() -> fs.LocalFileSystem:
    return fs.LocalFileSystem()


@functools.cache
def _remote_root(scheme: str, authority: str, query: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a URI and what its paths start with there (a bucket's name, say)."""
    probe = "_"
    try:
        filesystem, path = fs.FileSystem.from_uri(_uri(scheme, authority, "/" + probe, query))
    except (OSError, ValueError, ImportError, pa.ArrowException) as error:
        raise UserError(f"input {scheme}://{authority}: {one_line(error)}") from error
    return filesystem, path.removesuffix(probe)


def _parts(uri: str) -> tuple[str, str, str, str]:
    """Scheme, authority, path and query of a URI that may hold wildcards."""
    head, *query = _QUERY.split(uri, maxsplit=1)
    scheme, rest = head.split("://", 1)
    authority, slash, inner = rest.partition("/")
    return scheme, authority, slash + inner, query[0] if query else ""


def _uri(scheme: str, authority: str, path: str, query: str) -> str:
    return f"{scheme}://{authority}{path}" + (f"?{query}" if query else "")
