"""`gristmill verify`: rows in = rows out = vectors, with every byte as it was committed.

What is not done yet (`pending`) is told apart from what is damaged (`problems`): a job that was killed is mended by
running it again, a damaged file is not.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.commits import Commit, read_commit
from pipeline.durable import file_sha256
from pipeline.errors import JobError, UserError
from pipeline.extensions import read_extensions
from pipeline.index.check import IndexedParts, index_problems, is_of_these_parts
from pipeline.index.deletions import is_all_deleted, read_deleted
from pipeline.index.manifest import MANIFEST_NAME, IndexManifest, read_manifest
from pipeline.index.versions import lacks_name
from pipeline.indexed_jobs import job_folder, latest_commits
from pipeline.job_folder import JobFolder, PlannedSplit, parse_commit_name, parse_splits, part_name, read_job, read_plan
from pipeline.lock import lock_holder
from pipeline.neighbours import SEARCH_NAME
from pipeline.part_check import part_problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was found. The counts are of what is committed, whether or not it is whole."""

    problems: tuple[str, ...]  # damage, a line each
    pending: tuple[str, ...]  # what running the job again still has to do, a line each
    rows_planned: int
    rows: int
    errors: int
    error_codes: Mapping[str, int]
    records: int
    vectors: int
    splits_planned: int
    splits: int
    indexed_vectors: int | None  # None where there is no index that can be read
    deleted_vectors: int = 0  # of those: never found
    neighbours: int | None = None  # of a bulk search, whose queries are the rows

    @property
    def complete(self) -> bool:
        return not self.pending

    @property
    def ok(self) -> bool:
        """Everything that was planned is there, once, and as it was written."""
        return not self.problems and not self.pending

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "complete": self.complete, **dataclasses.asdict(self)}


def audit(out: Path) -> Audit:
    """Reads everything in the job directory `out`, and changes nothing. UserError where there is no job directory.

    `out` may also be what `gristmill query --output` or `index merge` has made.

    Memory: one part's row numbers and one shard of the index. Time: reading every file up to three times.
    """
    folder = JobFolder(out)
    if (out / SEARCH_NAME).exists():
        from pipeline.search_audit import SearchAuditor  # which is one of these

        return SearchAuditor(folder).run()
    has_index = (folder.index / MANIFEST_NAME).exists() or lacks_name(folder)
    if not folder.job_file.exists() and has_index and not _listed(folder.commits):
        return Auditor(folder).run_index()
    if not any(path.exists() for path in (folder.job_file, folder.plan_file, folder.commits)):
        raise UserError(f"{out} is not a job directory: it has no job.json, no plan.json and no commits/")
    return Auditor(folder).run()


class Auditor:
    """Gathers findings from the top down: what the job is, its plan, its commits, their parts, the index.

    `search_audit` looks through the answers of a bulk search by the same steps.
    """

    def __init__(self, folder: JobFolder) -> None:
        self._folder = folder
        self._problems: list[str] = []
        self._pending: list[str] = []
        self._unreadable: set[int] = set()  # splits with a commit that is damaged: nothing more is said of them

    def run(self) -> Audit:
        self._note_holder()
        job = self._job()
        splits = self._plan(job)
        latest, older = self._commits(job, splits)
        num_before = len(self._problems)
        self._parts(latest, older)
        index = self._index(latest, wanted=_wants_index(job, latest), parts_are_whole=len(self._problems) == num_before)
        self._extensions(index)
        return self._found(splits, latest, index=index)

    def _found(
        self,
        splits: Sequence[PlannedSplit] | None,
        latest: Mapping[int, Commit],
        *,
        index: IndexManifest | None = None,
        neighbours: int | None = None,
    ) -> Audit:
        codes: Counter[str] = Counter()
        for commit in latest.values():
            codes.update(commit.error_codes)
        return Audit(
            problems=tuple(self._problems),
            pending=tuple(self._pending),
            rows_planned=sum(split.num_rows for split in splits or ()),
            rows=sum(commit.rows for commit in latest.values()),
            errors=sum(commit.errors for commit in latest.values()),
            error_codes=dict(sorted(codes.items())),
            records=sum(commit.records for commit in latest.values()),
            vectors=sum(sum(commit.vectors.values()) for commit in latest.values()),
            splits_planned=len(splits or ()),
            splits=len(latest),
            indexed_vectors=None if index is None else index.num_vectors,
            deleted_vectors=0 if index is None else index.num_deleted,
            neighbours=neighbours,
        )

    def _note_holder(self) -> None:
        holder = lock_holder(self._folder)
        if holder is not None:
            self._pending.append(f"{holder} is running this job just now, so that what follows may be in between")

    def run_index(self) -> Audit:
        """Of a directory that holds nothing but an index, which others were merged into."""
        return self._found(None, {}, index=self._index({}, wanted=True, parts_are_whole=True))

    def _extensions(self, index: IndexManifest | None) -> None:
        """Jobs over files that came later belong to this one, and are whole or not with it."""
        try:
            extensions = read_extensions(self._folder)
        except JobError as error:
            self._problems.append(str(error))
            return
        indexed = {job.directory(self._folder.root) for job in index.jobs} if index is not None else set()
        for one in extensions:
            if not one.began(self._folder):
                continue
            root = one.folder(self._folder).root
            found = audit(root)
            self._problems.extend(found.problems)
            self._pending.extend(found.pending)
            if one.directory(self._folder) not in indexed and (found.pending or found.vectors):
                left = "still to be run and added" if found.pending else "still to be added"
                self._pending.append(f"the rows of {root} are {left}: gristmill index extend {self._folder.root}")

    def _not_begun(self, path: Path) -> bool:
        """Whether `path`, which every job has, is missing because a run ended before it was written."""
        if path.exists() or _listed(self._folder.commits) or _listed(self._folder.parts):
            return False
        self._pending.append(f"{path} is not there yet")
        return True

    def _job(self) -> dict[str, Any] | None:
        if self._not_begun(self._folder.job_file):
            return None
        try:
            return read_job(self._folder)
        except JobError as error:
            self._problems.append(str(error))
            return None

    def _plan(self, job: Mapping[str, Any] | None) -> list[PlannedSplit] | None:
        path = self._folder.plan_file
        if self._not_begun(path):
            return None
        try:
            plan = read_plan(self._folder)
            splits = parse_splits(plan["splits"])
        except JobError as error:
            self._problems.append(str(error))
            return None
        except (KeyError, TypeError, ValueError) as error:
            self._problems.append(f"{path} is no plan: {error}")
            return None
        if job is not None and plan["fingerprint"] != job["fingerprint"]:
            self._problems.append(f"{path} is another job's: its fingerprint is not the one in {self._folder.job_file}")
        return splits

    def _commits(
        self, job: Mapping[str, Any] | None, splits: list[PlannedSplit] | None
    ) -> tuple[dict[int, Commit], dict[int, list[Commit]]]:
        """The latest commit of each split, and those that it replaced and that are still there."""
        latest: dict[int, Commit] = {}
        older: dict[int, list[Commit]] = {}
        for commit in sorted(self._readable_commits(), key=lambda commit: (commit.split, commit.revision)):
            path = self._folder.commit(commit.split, commit.revision)
            if job is not None and commit.fingerprint != job["fingerprint"]:
                self._problems.append(f"{path} is another job's: its fingerprint is not the one in job.json")
            if commit.split in latest:
                older.setdefault(commit.split, []).append(latest[commit.split])
            latest[commit.split] = commit
        for split, commits in older.items():
            for commit in commits:
                path = self._folder.commit(split, commit.revision)
                self._pending.append(f"{path} was replaced by revision {latest[split].revision} and not yet removed")
        samples = Counter(commit.samples for commit in latest.values())
        for commit in latest.values():
            path = self._folder.commit(commit.split, commit.revision)
            if commit.samples != samples.most_common(1)[0][0]:
                self._problems.append(f"{path} has {commit.samples} samples a row, unlike the others")
            if splits is not None:
                self._hold_to_plan(path, commit, splits)
        unfinished = [split for split in splits or () if split.index not in {*latest, *self._unreadable}]
        if unfinished:
            rows = sum(split.num_rows for split in unfinished)
            self._pending.append(f"{len(unfinished)} of {len(splits or ())} splits, {rows} rows, are not done yet")
        return latest, older

    def _readable_commits(self) -> Iterator[Commit]:
        for name in _listed(self._folder.commits):
            parsed = parse_commit_name(name)
            if parsed is None:
                self._problems.append(f"{self._folder.commits / name} is no commit")
                continue
            try:
                yield read_commit(self._folder, name)
            except JobError as error:
                if not (self._folder.commits / name).exists():
                    continue  # a run that is going on has replaced it since the folder was listed
                self._problems.append(str(error))
                self._unreadable.add(parsed[0])

    def _hold_to_plan(self, path: Path, commit: Commit, splits: list[PlannedSplit]) -> None:
        if not 0 <= commit.split < len(splits):
            self._problems.append(f"{path} is of split {commit.split}, and the plan has {len(splits)} splits")
            return
        planned = splits[commit.split]
        if commit.first_row != planned.first_row or not 0 < commit.rows <= planned.num_rows:
            self._problems.append(
                f"{path} has {commit.rows} rows from {commit.first_row} on, "
                f"and the plan {planned.num_rows} from {planned.first_row} on"
            )
        elif commit.rows < planned.num_rows:
            left = planned.num_rows - commit.rows
            self._pending.append(f"split {commit.split} was cut short by a limit: {left} of its rows are not done yet")

    def _parts(self, latest: Mapping[int, Commit], older: Mapping[int, list[Commit]]) -> None:
        committed = {part_name(split) for split in {*latest, *self._unreadable}}
        for name in _listed(self._folder.parts):
            if name not in committed and name not in map(part_name, self._revisions_now()):
                self._problems.append(f"{self._folder.parts / name} has no commit: it is no part of this job")
        for split, commit in sorted(latest.items()):
            path = self._folder.part(split)
            found = file_sha256(path) if path.is_file() else None
            if found == commit.sha256:
                self._problems.extend(f"{path}: {line}" for line in self._part_problems(path, commit))
            elif self._is_unpublished(commit) and (
                found is None or found in {before.sha256 for before in older.get(split, ())}
            ):
                self._pending.append(f"split {split} is committed and its part not yet published")
            elif self._revisions_now().get(split) != commit.revision:
                self._pending.append(f"split {split} was committed again while it was looked at")
            elif found is None:
                self._problems.append(f"{path} is missing, and its commit says that it was written")
            else:
                self._problems.append(f"{path} is damaged: its sha256 is not the one in its commit")

    def _part_problems(self, path: Path, commit: Commit) -> Iterator[str]:
        return part_problems(path, commit)

    def _revisions_now(self) -> dict[int, int]:
        """Split -> its latest commit's revision. A run that is going on may have committed since the audit began."""
        parsed = (parse_commit_name(name) for name in _listed(self._folder.commits))
        return dict(sorted(found for found in parsed if found is not None))

    def _is_unpublished(self, commit: Commit) -> bool:
        path = self._folder.root / commit.path
        return path.is_file() and file_sha256(path) == commit.sha256

    def _index(self, latest: Mapping[int, Commit], *, wanted: bool, parts_are_whole: bool) -> IndexManifest | None:
        if not self._folder.index.exists():
            if lacks_name(self._folder):
                self._pending.append(
                    "the index was being replaced and lies in index-versions/: "
                    f"`gristmill index show {self._folder.root}` puts it back"
                )
            elif wanted:
                self._pending.append("the index is not built yet, or was removed")
            return None
        try:
            manifest = read_manifest(self._folder.index)
        except UserError:
            self._problems.append(f"{self._folder.index / MANIFEST_NAME} is missing")
            return None
        except JobError as error:
            self._problems.append(str(error))
            return None
        parts = self._indexed_parts(manifest, latest)
        if parts is not None:
            self._problems.extend(index_problems(self._folder, manifest, parts, parts_are_whole=parts_are_whole))
        return manifest

    def _indexed_parts(self, manifest: IndexManifest, latest: Mapping[int, Commit]) -> list[IndexedParts] | None:
        """Of all jobs of the index. None where one of them is gone or changed since, of which something is said."""
        try:
            deleted = read_deleted(self._folder.index, manifest)
        except JobError as error:
            self._problems.append(str(error))
            return None
        found = list[IndexedParts]()
        for job, first in zip(manifest.jobs, manifest.first_vectors, strict=True):
            if job.path == ".":
                if is_of_these_parts(job, latest):
                    found.append(IndexedParts(self._folder, latest))
                elif not self._unreadable:
                    self._pending.append("the index was built from other parts than those that are committed now")
                continue
            if is_all_deleted(deleted, first, job.num_vectors):
                found.append(IndexedParts(self._folder, None))
                continue
            try:
                folder = job_folder(self._folder.root, job)
                commits = latest_commits(folder)
            except JobError as error:
                self._problems.append(str(error))
                continue
            if is_of_these_parts(job, commits):
                found.append(IndexedParts(folder, commits))
            else:
                self._pending.append(
                    f"the parts in {folder.root} are others than those that were added to the index as {job.job!r}; "
                    "delete its rows from the index and add it again"
                )
        return found if len(found) == len(manifest.jobs) else None


def _wants_index(job: Mapping[str, Any] | None, latest: Mapping[int, Commit]) -> bool:
    """A job that embeds has an index, unless its spec says `index: false`."""
    spec = {} if job is None else job.get("spec", {})
    return any(commit.vectors for commit in latest.values()) and spec.get("index", "auto") not in (None, False)


def _listed(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []
