"""Versions of an index: each change, and building it again, makes the next one beside it, which takes its place whole.

    _attempts/index-...     the next version while it is made; files that don't change are the old ones, by hard links
    index/                  the newest
    index-versions/000003   the one before it, until the next change: who still works with it finds its files there

A crash at any moment leaves the old version or the new one. Where two names can't be exchanged in one step it may leave
the old one as index-versions/replaced, from where `put_back` brings it. What makes a change holds the directory's lock.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Final

from pipeline.durable import removed_on_failure, replace_folder, seal, storage_errors, sync_folder, write_new
from pipeline.errors import JobError, UserError
from pipeline.index.manifest import BUILT_AGAIN, MANIFEST_NAME, IndexManifest, VersionNote, read_manifest
from pipeline.job_folder import JobFolder
from pipeline.lock import lock_existing

VERSIONS_NAME: Final = "index-versions"
REPLACED_NAME: Final = "replaced"
_DRAFT_PREFIX: Final = "index-"
MOST_NOTES: Final = 1000  # of what versions were

# What a draft folder holds, which has the files of the manifest -> the manifest of what it holds then.
Change = Callable[[Path, IndexManifest], IndexManifest]


def change_index(folder: JobFolder, change: Change) -> IndexManifest:
    """Makes the next version of `index/` by `change`, which may add files to its folder and replace names in it.

    It must not write into a file that is there: those belong to the old version, too. UserError where there is no
    index, JobError where it is damaged or the storage fails; the old version stays then.
    """
    put_back_locked(folder)
    before = read_manifest(folder.index)
    clear_drafts(folder)
    draft = new_draft(folder)
    with removed_on_failure(draft), storage_errors("writing the index in", draft):
        draft.mkdir(parents=True)
        for contents in before.files:
            link_or_copy(folder.index / contents.file, draft / contents.file)
        changed = dataclasses.replace(change(draft, before), version=before.version + 1)
        changed = with_history(changed, before, folder.index, what_changed(before, changed))
        write_manifest(draft, changed)
        publish(folder, draft)
    return changed


def with_history(changed: IndexManifest, before: IndexManifest, folder: Path, change: str) -> IndexManifest:
    """`changed` with a note of what it is, after those of the version `before`, which is in `folder`."""
    history = before.history
    if not history:
        built_at = datetime.fromtimestamp((folder / MANIFEST_NAME).stat().st_mtime)
        history = (VersionNote.of(before, "built", built_at),)
    history = (*history, VersionNote.of(changed, change, datetime.now()))
    return dataclasses.replace(changed, history=history[-MOST_NOTES:])


def what_changed(before: IndexManifest, after: IndexManifest) -> str:
    """In words, from what the two hold."""
    changes = [f"added {job.job}: {job.num_vectors:,} vectors" for job in after.jobs[len(before.jobs) :]]
    if after.num_deleted > before.num_deleted:
        count = after.num_deleted - before.num_deleted
        changes.append(f"deleted {count:,} {'vector' if count == 1 else 'vectors'}")
    if after.num_absent > before.num_absent or len(after.shards) < len(before.shards):
        taken = after.num_absent - before.num_absent
        joined = len(after.shards) < len(before.shards)
        shards = f", {len(before.shards):,} shards to {len(after.shards):,}" if joined else ""
        changes.append(f"compacted: {taken:,} deleted vectors taken out{shards}")
    return ", ".join(changes) or "changed"


def write_manifest(draft: Path, manifest: IndexManifest) -> None:
    """The last file of a draft."""
    write_new(draft / MANIFEST_NAME, seal(manifest.to_json()))
    sync_folder(draft)


def put_back(folder: JobFolder) -> None:
    """Gives an index its name back that a crash has left without. Where one is being replaced just now it waits.

    JobError where that can't be done.
    """
    for attempt in range(10):
        if not lacks_name(folder):
            return
        try:
            with lock_existing(folder):
                put_back_locked(folder)
        except JobError:
            if attempt == 9:
                raise
            time.sleep(0.1)


def put_back_locked(folder: JobFolder) -> None:
    """The same for who holds the directory's lock."""
    if lacks_name(folder):
        with storage_errors("putting back", folder.index):
            os.rename(folder.root / VERSIONS_NAME / REPLACED_NAME, folder.index)
            sync_folder(folder.root)


def lacks_name(folder: JobFolder) -> bool:
    """Whether the index is there, and not under its name."""
    return not folder.index.exists() and (folder.root / VERSIONS_NAME / REPLACED_NAME / MANIFEST_NAME).is_file()


def new_draft(folder: JobFolder) -> Path:
    """Where the next version is to be made; names that begin with it are the draft's, too. Makes nothing."""
    return folder.attempts / f"{_DRAFT_PREFIX}{uuid.uuid4().hex}"


def clear_drafts(folder: JobFolder) -> None:
    """Removes what a change that was cut off has left."""
    for path in folder.attempts.glob(f"{_DRAFT_PREFIX}*") if folder.attempts.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """`target` is then a name of the same file, or where that can't be, a copy of it. JobError if it is missing."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise JobError(f"{source} is missing; {BUILT_AGAIN}") from None
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def kept_folder(folder: JobFolder, version: int) -> Path:
    """Where the files of a version that is not the newest are, while they are kept."""
    return folder.root / VERSIONS_NAME / f"{version:06d}"


def folder_of_version(folder: Path, manifest: IndexManifest) -> Path:
    """Where the files of this version of the index in `folder` (OUT/index) are now: there, or as the version before."""
    before = kept_folder(JobFolder(folder.parent), manifest.version)
    try:
        is_before = read_manifest(folder) != manifest and read_manifest(before) == manifest
    except (UserError, JobError):
        return folder
    return before if is_before else folder


def versions_present(folder: Path) -> list[tuple[Path, IndexManifest]]:
    """The versions of the index in `folder` (OUT/index) that are there, each with where its files are, newest first."""
    before = folder.parent / VERSIONS_NAME
    folders = [folder, *sorted(before.iterdir(), reverse=True)] if before.is_dir() else [folder]
    present = []
    for path in folders:
        with suppress(UserError, JobError):  # being replaced, or another's
            present.append((path, read_manifest(path)))
    return present


def publish(folder: JobFolder, draft: Path) -> None:
    """`draft`, an index whose files are flushed, takes the place of the one that is there, which is kept beside it."""
    versions, kept = folder.root / VERSIONS_NAME, None
    if folder.index.exists():
        with suppress(UserError, JobError):  # one that nobody can read is not kept
            kept = kept_folder(folder, read_manifest(folder.index).version)
        versions.mkdir(exist_ok=True)
        for path in versions.iterdir():
            shutil.rmtree(path)
    replace_folder(draft, folder.index, aside=versions / REPLACED_NAME, kept=kept)
