"""Files that survive a crash: written under another name, flushed to the disk, and only then given their name.

Every step is one call of `os`, in an order that leaves the folder right whichever of them is the last to happen.
Storage that fails (full, read-only, gone) surfaces as one line of `JobError`.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, Self, cast

from pipeline.errors import JobError

READ_BLOCK_BYTES: Final = 1 << 20
_FLUSHED_BYTES: Final = 8 << 20
_BEGIN_WRITING: Final = 2  # SYNC_FILE_RANGE_WRITE
_HERE: Final = -100  # AT_FDCWD: relative paths are from the current directory
_EXCHANGE: Final = 2  # RENAME_EXCHANGE

_HOW_TO_MEND: Final = {
    errno.ENOSPC: "no space left; free some and run again, finished splits are kept",
    errno.EDQUOT: "the disk quota is used up; free some space and run again, finished splits are kept",
    errno.EROFS: "the filesystem is read-only; choose another output.path",
    errno.EACCES: "permission denied; choose another output.path or change the folder's owner",
    errno.EPERM: "permission denied; choose another output.path or change the folder's owner",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another output.path",
}


@contextmanager
def storage_errors(doing: str, path: Path) -> Iterator[None]:
    """OSError inside becomes a JobError of one line: what was being done, to which path, and how to mend it."""
    try:
        yield
    except OSError as error:
        reason = _HOW_TO_MEND.get(error.errno or 0) or error.strerror or " ".join(str(error).split())
        raise JobError(f"{doing} {path} failed: {reason}") from error


@contextmanager
def removed_on_failure(*folders: Path) -> Iterator[None]:
    """What the block was making in these folders goes where it fails, of whatever; what it raised is raised on."""
    try:
        yield
    except Exception:  # raised on below
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def sync_folder(folder: Path) -> None:
    """Makes names created, renamed or removed in `folder` last through a power cut, where the filesystem can."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems flush no folders
            raise
    finally:
        os.close(handle)


def write_all(handle: int, content: bytes | memoryview) -> None:
    """`content` is of bytes: a memoryview of another format is to be cast."""
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view) :]


def write_new(path: Path, content: bytes) -> None:
    """Creates `path`, which must not exist, and flushes it. The name itself lasts after `sync_folder`."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_all(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)


class HashedFile:
    """A new file that is hashed while it is written and flushed when its block ends; removed when the block fails.

    `path` must not exist. `sha256` and `size_bytes` are of what was written so far. The disk begins with it while more
    comes, so that the flush at the end has little to wait for.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._handle = -1
        self._begun_bytes = 0
        self.size_bytes = 0
        self.closed = False

    def __enter__(self) -> Self:
        self._handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                os.fsync(self._handle)
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        finally:
            os.close(self._handle)
        if isinstance(error, Exception):
            self._path.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    @property
    def sink(self) -> IO[bytes]:
        """This file, for those who ask for a file object: what Parquet's writer needs of one is here."""
        return cast(IO[bytes], self)

    def write(self, content: bytes | memoryview) -> int:
        self._digest.update(content)
        write_all(self._handle, content)
        self.size_bytes += len(content)
        if self.size_bytes - self._begun_bytes >= _FLUSHED_BYTES:
            _begin_writing(self._handle, self._begun_bytes, self.size_bytes - self._begun_bytes)
            self._begun_bytes = self.size_bytes
        return len(content)

    def tell(self) -> int:
        return self.size_bytes

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Says that the writer is done; the file itself is closed when its block ends."""
        self.closed = True


def _begin_writing(handle: int, start: int, count: int) -> None:
    """Asks for these bytes of a file to be taken to the disk, and does not wait (Linux); elsewhere nothing is done.

    Whatever goes wrong with them `os.fsync` says.
    """
    sync_file_range = getattr(_c_library(), "sync_file_range", None)
    if sync_file_range is not None:
        sync_file_range(handle, ctypes.c_int64(start), ctypes.c_int64(count), ctypes.c_uint(_BEGIN_WRITING))


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def replace_folder(new: Path, target: Path, *, aside: Path, kept: Path | None = None) -> None:
    """Moves the folder `new`, whose files are flushed, to `target`, in place of a folder that may be there.

    In one step where the system can exchange two names (Linux, local filesystems). Elsewhere `target` is missing for a
    moment, and after a crash in that moment: the folder that was there is `aside` then, a name that is free, to be put
    back from there. In the end it is removed, or where `kept` is given it has that name. `new` is to lie where
    leftovers are cleared.
    """
    if not target.exists():
        os.rename(new, target)
        sync_folder(target.parent)
        return
    before = new
    if not _exchange(new, target):
        before = aside
        os.rename(target, aside)
        sync_folder(aside.parent)
        os.rename(new, target)
    sync_folder(target.parent)
    if kept is None:
        shutil.rmtree(before)
    else:
        os.rename(before, kept)
        sync_folder(kept.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step, by Linux's renameat2. False where that is not possible; nothing was done then."""
    renameat2 = getattr(_c_library(), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)


def replace_file(path: Path, content: bytes, *, drafts: Path) -> None:
    """`path` holds either what it held before or all of `content`, at every moment.

    `drafts` is a folder on the same filesystem; what a crash leaves there is garbage.
    """
    draft = drafts / f"{path.name}.{uuid.uuid4().hex}"
    try:
        write_new(draft, content)
        os.rename(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def file_sha256(path: Path) -> str:
    """Hexadecimal, over the file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def seal(document: dict[str, Any]) -> bytes:
    """JSON for people and programs whose last key, `checksum`, covers every byte before it.

    >>> seal({"rows": 2})
    b'{\\n "rows": 2,\\n "checksum": "ab1e8e..."\\n}\\n'
    """
    assert "checksum" not in document
    body = _json(document)
    return _json({**document, "checksum": hashlib.sha256(body).hexdigest()})


def unseal(content: bytes, path: Path) -> dict[str, Any]:
    """The document that `seal` was given. JobError if any byte of it was changed; `path` is for the message."""
    try:
        document = json.loads(content)
        if isinstance(document, dict) and "checksum" in document:
            del document["checksum"]
            if seal(document) == content:
                return document
    except (ValueError, RecursionError):
        pass  # no JSON that `seal` writes
    raise JobError(f"{path} is damaged: its content does not match its own checksum")


def read_sealed(path: Path) -> dict[str, Any]:
    """JobError if the file is missing, unreadable or damaged."""
    with storage_errors("reading", path):
        content = path.read_bytes()
    return unseal(content, path)


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "surrogatepass")
