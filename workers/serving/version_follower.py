"""Has a served index follow what becomes of its directory: each new version is served soon after it is there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from ray.exceptions import RayError

from pipeline.errors import JobError, UserError, one_line
from pipeline.index.manifest import MANIFEST_NAME, read_manifest
from workers.serving.actor_calls import death_reason
from workers.serving.index_service import IndexService

LOOK_S: Final = 1.0
RETRY_S: Final = 60.0  # after a version that could not be served

Stamp = tuple[int, ...]  # of a file: another when it was replaced


class VersionFollower:
    """Looks at index.json once a second, in a thread of its own, until it is stopped.

    `on_change` hears, in that thread, what became of a new version, in one line each.
    """

    def __init__(self, service: IndexService, folder: Path, on_change: Callable[[str], None]) -> None:
        self._service = service
        self._folder = folder
        self._on_change = on_change
        self._seen: Stamp | None = None
        self._retry_at = float("inf")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """A version that is being loaded then is given up when the service is closed; `join` after that."""
        self._ended.set()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_S):
            stamp = _stamp(self._folder / MANIFEST_NAME)
            if stamp is not None and (stamp != self._seen or time.monotonic() >= self._retry_at):
                self._look(stamp)

    def _look(self, stamp: Stamp) -> None:
        before = self._service.manifest
        try:
            manifest = read_manifest(self._folder)
            if manifest.digest != before.digest:
                self._service.take_version(manifest)
                found = manifest.num_vectors - manifest.num_deleted
                self._tell(f"now serving version {manifest.version}: {found:,} vectors")
            self._retry_at = float("inf")
        except Exception as error:  # or else no version would be followed any more
            if self._ended.is_set():
                return
            if stamp != self._seen:
                self._tell(f"still serving version {before.version}, not what is there by now: {_reason(error)}")
            self._retry_at = time.monotonic() + RETRY_S
        self._seen = stamp

    def _tell(self, words: str) -> None:
        with suppress(OSError, ValueError):  # where it would be said, as on a terminal, is gone
            self._on_change(words)


def _reason(error: Exception) -> str:
    if isinstance(error, UserError | JobError):
        return str(error)
    return death_reason(error) if isinstance(error, RayError) else f"{type(error).__name__}: {one_line(error)}"


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except OSError:  # for a moment, where a folder can't be exchanged in one step
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
