"""The header of a GGUF file: its metadata and where its tensors lie, read without touching them.

`gguf.GGUFReader` makes a numpy view of every string, which takes seconds for a vocabulary; start-up can't wait for
that. This reads the same header in a tenth of a second. The format is described in ggml's docs/gguf.md.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

GgufValue = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DIMENSIONS = 8  # the most a tensor can have; ggml's own limit is 4
_ALIGNMENT = 32  # of the tensors' bytes, unless general.alignment says otherwise
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


def read_gguf_metadata(path: Path, *, prefix: str | tuple[str, ...] = "") -> dict[str, GgufValue]:
    """Return the metadata whose keys begin with `prefix` (or one of them), in file order.

    UserError when the file is not whole GGUF.
    `read_gguf_metadata(path, prefix="general.")["general.architecture"]` is for instance `"llama"`.
    """
    with _opened(path) as data:
        return _Header(data, path).read(prefix)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """`shape` in row-major order (GGUF lists it the other way round); `kind` is ggml's number of the number format."""

    shape: tuple[int, ...]
    kind: int
    offset: int  # bytes from the start of the file


def read_gguf_header(
    path: Path, *, prefix: str | tuple[str, ...] = ""
) -> tuple[dict[str, GgufValue], dict[str, GgufTensor]]:
    """As `read_gguf_metadata`, and name -> place of every tensor of this one file, in file order.

    Whether the tensors' bytes are all there is for their reader to find out: it knows the formats' sizes.
    """
    prefixes = (prefix,) if isinstance(prefix, str) else prefix
    with _opened(path) as data:
        header = _Header(data, path)
        metadata = header.read((*prefixes, "general.alignment"))
        return metadata, header.tensors(metadata.get("general.alignment", _ALIGNMENT))


def gguf_files(path: Path) -> list[Path]:
    """Return every file of a model that `path` belongs to: `NAME-00001-of-00003.gguf` has two siblings.

    UserError names the siblings that are missing.
    """
    shard = _SHARD.match(path.name)
    if shard is None:
        return [path]
    count = int(shard["count"])
    files = [path.with_name(f"{shard['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{path}: the model has {count} files and {', '.join(missing)} is not beside it")
    return files


@contextmanager
def _opened(path: Path) -> Iterator[mmap.mmap]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: can't be read as GGUF: {error}") from None  # mmap refuses an empty file


class _Header:
    """A cursor over the bytes of a GGUF file. Every read is checked against the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._at = 0
        self._num_tensors = 0

    def read(self, prefix: str | tuple[str, ...]) -> dict[str, GgufValue]:
        if self._data[:4] != b"GGUF":
            raise UserError(f"{self._path}: not a GGUF file (it does not begin with 'GGUF')")
        self._at = 4
        version = int(self._scalar("I"))
        if version & 0xFFFF == 0:
            raise UserError(f"{self._path}: big-endian GGUF files are not supported; convert it for this machine")
        if version not in (2, 3):
            raise UserError(f"{self._path}: GGUF version {version} is not supported (2 and 3 are); convert it anew")
        self._num_tensors = int(self._scalar("Q"))
        metadata: dict[str, GgufValue] = {}
        for _ in range(int(self._scalar("Q"))):
            key = self._string()
            kind = int(self._scalar("I"))
            if key.startswith(prefix):
                metadata[key] = self._value(kind, key)
            else:
                self._skip(kind, key)
        return metadata

    def tensors(self, alignment: GgufValue) -> dict[str, GgufTensor]:
        """Return the tensors, whose list follows the metadata that `read` has gone through."""
        if not isinstance(alignment, int) or alignment < 1:
            raise UserError(f"{self._path}: corrupt GGUF header: general.alignment is {alignment!r}")
        places: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(self._num_tensors):
            name = self._string()
            num_dimensions = int(self._scalar("I"))
            if name in places or num_dimensions > _DIMENSIONS:
                raise UserError(f"{self._path}: corrupt GGUF header: tensor {name!r} is there twice or has no shape")
            shape = tuple(int(self._scalar("Q")) for _ in range(num_dimensions))[::-1]
            places[name] = (shape, int(self._scalar("I")), int(self._scalar("Q")))
        start = -(-self._at // alignment) * alignment
        return {
            name: GgufTensor(shape=shape, kind=kind, offset=start + offset)
            for name, (shape, kind, offset) in places.items()
        }

    def _value(self, kind: int, key: str) -> GgufValue:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        item, count = self._array(kind, key)
        if item in _SCALARS:
            layout = f"<{count}{_SCALARS[item]}"
            start = self._advance(struct.calcsize(layout))
            return list(struct.unpack_from(layout, self._data, start))
        return self._strings(count)

    def _skip(self, kind: int, key: str) -> None:
        if kind in _SCALARS:
            self._advance(struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING:
            self._advance(int(self._scalar("Q")))
        else:
            item, count = self._array(kind, key)
            if item in _SCALARS:
                self._advance(count * struct.calcsize(_SCALARS[item]))
            else:
                self._skip_strings(count)

    def _strings(self, count: int) -> list[str]:
        """Read `count` strings. A vocabulary has hundreds of thousands, so this does not call `_string`."""
        data, at, size = self._data, self._at, len(self._data)
        texts = []
        for _ in range(count):
            start = at + 8
            at = start + int.from_bytes(data[at:start], "little")
            if at > size:
                raise self._truncated()
            try:
                texts.append(data[start:at].decode("utf-8"))
            except UnicodeDecodeError:
                raise self._not_text(start) from None
        self._at = at
        return texts

    def _skip_strings(self, count: int) -> None:
        data, at, size = self._data, self._at, len(self._data)
        for _ in range(count):
            at += 8 + int.from_bytes(data[at : at + 8], "little")
            if at > size:
                raise self._truncated()
        self._at = at

    def _array(self, kind: int, key: str) -> tuple[int, int]:
        """Return the item type and the number of items of the array that begins here."""
        if kind != _ARRAY:
            raise UserError(f"{self._path}: corrupt GGUF header: {key!r} has the unknown type {kind}")
        item, count = int(self._scalar("I")), int(self._scalar("Q"))
        if item not in _SCALARS and item != _STRING:
            raise UserError(f"{self._path}: corrupt GGUF header: {key!r} is an array of the unknown type {item}")
        if count > len(self._data) - self._at:  # an item takes at least a byte
            raise self._truncated()
        return item, count

    def _scalar(self, layout: str) -> bool | int | float:
        start = self._advance(struct.calcsize(layout))
        value: bool | int | float = struct.unpack_from(f"<{layout}", self._data, start)[0]
        return value

    def _string(self) -> str:
        length = int(self._scalar("Q"))
        start = self._advance(length)
        try:
            return self._data[start : self._at].decode("utf-8")
        except UnicodeDecodeError:
            raise self._not_text(start) from None

    def _advance(self, num_bytes: int) -> int:
        """Move past `num_bytes` and return where they begin."""
        start = self._at
        if num_bytes > len(self._data) - start:
            raise self._truncated()
        self._at = start + num_bytes
        return start

    def _not_text(self, start: int) -> UserError:
        return UserError(f"{self._path}: corrupt GGUF header: text at byte {start} is not UTF-8")

    def _truncated(self) -> UserError:
        return UserError(f"{self._path}: truncated GGUF file: its header goes on past the end; fetch it again")
