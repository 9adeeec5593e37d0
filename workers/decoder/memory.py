"""Keeps the memory that loading needs in passing from staying with the process."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's parameters
_WHILE_LOADING = 64 * 1024  # bytes
_AFTERWARDS = 32 * 1024 * 1024  # where glibc's own adjustment ends, too


@contextmanager
def freed_at_once() -> Iterator[None]:
    """While it lasts, glibc gives each larger block back to the system when it is freed.

    Left alone it raises the size from which it does so up to 32 MB, and the holes that passing tensors leave between
    weights add a third to a small model's memory. Elsewhere than with glibc this does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_THRESHOLD, _WHILE_LOADING)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _AFTERWARDS)
        mallopt(_TRIM_THRESHOLD, 2 * _AFTERWARDS)
