"""One controller at a time holds a job directory. The lock is the kernel's, which releases it when its holder dies."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Final

from pipeline.durable import storage_errors
from pipeline.errors import JobError
from pipeline.job_folder import JobFolder

_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_held: Final[set[int]] = set()  # this process's handles that hold a lock


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a job directory. The fields are for people: the lock itself is the kernel's."""

    pid: int
    host: str
    since: str  # local time with offset, ISO 8601

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextmanager
def lock(folder: JobFolder) -> Iterator[None]:
    """Holds the job directory, creating it if need be. JobError naming the holder while another process has it.

    Children don't inherit the lock: not across exec, and not by fork, whose child closes its copy of the handle.
    """
    folder.create()
    with lock_existing(folder):
        yield


@contextmanager
def lock_existing(folder: JobFolder) -> Iterator[None]:
    """As `lock`, for a directory that is there: makes nothing in it but the lock's file."""
    with storage_errors("locking", folder.lock_file):
        handle = _acquire(folder)
    if handle is None:
        raise JobError(
            f"{folder.root} is in use by {_read_holder(folder) or 'another process'}; "
            "wait until it is done, or stop it: its finished splits are kept"
        )
    _held.add(handle)
    try:
        with storage_errors("locking", folder.lock_file):
            _write_holder(handle)
        yield
    finally:
        _held.discard(handle)
        os.close(handle)


def lock_holder(folder: JobFolder) -> Holder | None:
    """Who holds the job directory just now, or None. Changes nothing, also where the folder is read-only."""
    try:
        handle = os.open(folder.lock_file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_holder(folder) or Holder(pid=0, host="unknown", since="unknown")
    except OSError:
        return None
    finally:
        os.close(handle)
    return None


def _acquire(folder: JobFolder) -> int | None:
    """A handle that holds the lock, or None where another process does."""
    while True:
        handle = os.open(folder.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.fstat(handle).st_ino == os.stat(folder.lock_file).st_ino
        except BlockingIOError:
            os.close(handle)
            return None
        except FileNotFoundError:
            same = False
        except OSError as error:
            os.close(handle)
            if error.errno in _NO_LOCKS:
                raise JobError(
                    f"{folder.root} is on a filesystem without file locks; choose another output.path"
                ) from error
            raise
        if same:  # and not a file that someone removed, whose name another process may lock anew
            return handle
        os.close(handle)


def _write_holder(handle: int) -> None:
    holder = Holder(pid=os.getpid(), host=socket.gethostname(), since=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(asdict(holder)).encode(), 0)


def _read_holder(folder: JobFolder) -> Holder | None:
    try:
        return Holder(**json.loads(folder.lock_file.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _forget_locks() -> None:
    """In a forked child: an open copy of a handle would keep the lock after the parent's death."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)
