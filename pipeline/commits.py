"""Which attempts became real. A commit file, created exclusively, is the truth; `parts/` follows it.

A split may be committed again at the next revision: when a limit had cut it short, or failed rows were tried again.
The new commit is written, its part replaces the old one in `parts/`, and then the old commit is removed. So at every
moment `parts/` holds one part of each published split, and a crash anywhere is mended by `CommitLog.recover`:

    commit written                          attempt moved into parts/          older commit removed
    ----------------|--------------------------------|-------------------------------|----------->
      crash here:      recover moves the attempt        recover removes the older       nothing to do
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.attempt import Attempt
from pipeline.durable import file_sha256, read_sealed, seal, storage_errors, sync_folder, write_new
from pipeline.errors import JobError
from pipeline.job_folder import JobFolder, commit_name, parse_commit_name, part_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit(Attempt):
    """What a commit file says: the attempt, the part that it becomes, and whose it is."""

    part: str  # file name in parts/
    fingerprint: str  # of the job

    def to_json(self) -> dict[str, Any]:
        document = dataclasses.asdict(self)
        first = ("split", "part", "sha256", "rows", "errors")
        return {name: document[name] for name in (*first, *(name for name in document if name not in first))}

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Commit:
        return Commit(**document)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What `CommitLog.recover` found to mend."""

    published: tuple[int, ...]  # splits that were committed and not yet in parts/
    dropped: tuple[int, ...]  # splits whose committed part was gone, so that they are to be run again
    cleared: int  # leftovers removed from _attempts/


class CommitLog:
    """The commits of one job directory. Its user holds the directory's lock; `recover` comes before everything else."""

    def __init__(self, folder: JobFolder, *, fingerprint: str) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        self._commits: dict[int, Commit] = {}
        self._older: dict[int, list[Commit]] = {}  # commits that a later revision replaced and that are still there

    @property
    def commits(self) -> Mapping[int, Commit]:
        """Split -> its latest commit."""
        return self._commits

    def next_revision(self, split: int) -> int:
        """The revision that the next attempt at this split must have."""
        commit = self._commits.get(split)
        return 0 if commit is None else commit.revision + 1

    def commit(self, attempt: Attempt) -> Commit:
        """Makes the attempt real. Whatever happens afterwards, its part will be in parts/.

        JobError if the split was committed at this revision before, if the attempt's file is not here, or if the
        storage fails.
        """
        path = self._folder.root / attempt.path
        if attempt.revision != self.next_revision(attempt.split):
            raise JobError(
                f"split {attempt.split} can't be committed at revision {attempt.revision}: "
                f"it is at {self.next_revision(attempt.split)}"
            )
        with storage_errors("looking at", path):
            size_bytes = path.stat().st_size if path.exists() else None
        if size_bytes != attempt.size_bytes:
            found = "is not there" if size_bytes is None else f"has {size_bytes} bytes, not {attempt.size_bytes}"
            raise JobError(
                f"{path}, which a worker wrote, {found}; the output must be on a filesystem that all nodes share"
            )
        commit = Commit(
            **{field.name: getattr(attempt, field.name) for field in dataclasses.fields(Attempt)},
            part=part_name(attempt.split),
            fingerprint=self._fingerprint,
        )
        target = self._folder.commit(commit.split, commit.revision)
        draft = self._folder.attempts / f"{target.name}.{uuid.uuid4().hex}"
        with storage_errors("writing", target):
            write_new(draft, seal(commit.to_json()))
            try:
                os.link(draft, target)
            except FileExistsError:
                # A network filesystem may repeat a link that succeeded; then both names are the same file.
                if os.stat(draft).st_nlink != 2:
                    raise
            sync_folder(self._folder.commits)
            os.unlink(draft)
        self._register(commit)
        return commit

    def publish(self, commit: Commit) -> None:
        """Moves the committed part into parts/ and removes the commits that this one replaces. May be repeated.

        JobError if the storage fails, or if the part is neither where it was written nor where it belongs.
        """
        assert self._commits.get(commit.split) == commit, "only the latest commit of a split is published"
        source, target = self._folder.root / commit.path, self._folder.part(commit.split)
        with storage_errors("publishing", target):
            if source.exists():
                os.rename(source, target)
                sync_folder(self._folder.parts)
            elif not target.exists():
                raise JobError(f"{target} is missing: run again and its split is done again")
            older = self._older.pop(commit.split, [])
            for replaced in older:
                self._folder.commit(replaced.split, replaced.revision).unlink(missing_ok=True)
            if older:
                sync_folder(self._folder.commits)

    def recover(self) -> Recovery:
        """Reads the commits, publishes what a crash left unpublished, and clears leftovers.

        A commit whose part is nowhere any more (someone removed the file) is dropped, so that its split runs again.
        JobError if a commit is damaged or another job's, if a part in parts/ has the wrong size or no commit, or if
        the storage fails.
        """
        self._folder.create()
        self._commits, self._older = {}, {}
        for commit in sorted(read_commits(self._folder), key=lambda commit: commit.revision):
            if commit.fingerprint != self._fingerprint:
                raise JobError(
                    f"{self._folder.commit(commit.split, commit.revision)} belongs to another job: its fingerprint is "
                    f"{commit.fingerprint}, this job's is {self._fingerprint}"
                )
            self._register(commit)
        published, dropped = [], []
        for split in sorted(self._commits):
            if self._drop_lost(split):
                dropped.append(split)
            elif (self._folder.root / self._commits[split].path).exists() or split in self._older:
                published.append(split)
            if split in self._commits:
                self.publish(self._commits[split])
        self._refuse_uncommitted()
        return Recovery(published=tuple(published), dropped=tuple(dropped), cleared=self._clear_attempts())

    def _register(self, commit: Commit) -> None:
        before = self._commits.get(commit.split)
        if before is not None:
            self._older.setdefault(commit.split, []).append(before)
        self._commits[commit.split] = commit

    def _drop_lost(self, split: int) -> bool:
        """Drops commits of a split, the latest first, until one has its part. True if any was dropped."""
        lost = False
        while (commit := self._commits.get(split)) is not None and not self._has_part(commit):
            lost = True
            path = self._folder.commit(commit.split, commit.revision)
            with storage_errors("removing", path):
                path.unlink()
                sync_folder(self._folder.commits)
            older = self._older.get(split, [])
            del self._commits[split]
            if older:
                self._commits[split] = older.pop()
        if not self._older.get(split):
            self._older.pop(split, None)
        return lost

    def _has_part(self, commit: Commit) -> bool:
        if (self._folder.root / commit.path).exists():
            return True
        path = self._folder.part(commit.split)
        if not path.exists():
            return False
        with storage_errors("reading", path):
            if commit.split in self._older:  # whose part is it: this revision's or the one before?
                return file_sha256(path) == commit.sha256
            size_bytes = path.stat().st_size
        if size_bytes != commit.size_bytes:
            raise JobError(
                f"{path} is damaged: it has {size_bytes} bytes and its commit says {commit.size_bytes}; "
                "remove it and run again, and its split is done again"
            )
        return True

    def _refuse_uncommitted(self) -> None:
        committed = {commit.part for commit in self._commits.values()}
        for path in sorted(self._folder.parts.glob("*.parquet")):
            if path.name not in committed:
                raise JobError(f"{path} has no commit, so it is no part of this job; move it away and run again")

    def _clear_attempts(self) -> int:
        cleared = 0
        with storage_errors("clearing", self._folder.attempts):
            for entry in os.scandir(self._folder.attempts):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
                cleared += 1
        return cleared


def read_commits(folder: JobFolder) -> list[Commit]:
    """Every commit on the disk, replaced ones too, by name. Files that are no commits are passed over.

    JobError if one is damaged: its checksum, its name, or what it says of itself.
    """
    with storage_errors("listing", folder.commits):
        names = sorted(os.listdir(folder.commits)) if folder.commits.exists() else []
    return [read_commit(folder, name) for name in names if parse_commit_name(name) is not None]


def read_commit(folder: JobFolder, name: str) -> Commit:
    """JobError if the file is missing, damaged, or not the commit that its name says."""
    path = folder.commits / name
    document = read_sealed(path)
    try:
        commit = Commit.from_json(document)
    except TypeError as error:
        raise JobError(f"{path} is not a commit of this version of gristmill: {error}") from error
    if commit_name(commit.split, commit.revision) != name or commit.part != part_name(commit.split):
        raise JobError(f"{path} is damaged: its name does not fit its content")
    return commit
