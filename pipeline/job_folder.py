"""Where things lie in a job directory, and what their names mean.

job.json  plan.json            sealed (pipeline.durable.seal); see `write_job` and `write_plan`
parts/part-000003.parquet      committed parts only, one a split
commits/000003.json            revision 0 of split 3; 000003.r1.json replaces it
index/  report.json  report.html
index-versions/000003          the index before its last change (pipeline.index.versions)
extensions/  extensions.json   jobs over files that came into the input later (pipeline.extensions)
runs.json  experts.json        how each run went, and what experts did in all of them, for the report
placements/000000.json         where each gang held its experts, in the order in which gangs were formed
atlas.parquet                  texts, places and neighbours for embedding-atlas (jobs.corpus.atlas)
submission.json                what a cluster runs the job as, where one does (jobs.submitting.submission)
run.log                        what the controller and the workers had to say
_attempts/                     work in progress; nothing in it is needed while nothing runs, but for an attempt
                               whose commit was written and that was not yet moved into parts/: without it
                               its split is done again
.lock                          held while a controller runs
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.durable import read_sealed, replace_file, seal, storage_errors
from pipeline.errors import JobError

_COMMIT_NAME: Final = re.compile(r"(\d{6,})(?:\.r([1-9]\d*))?\.json")


@dataclass(frozen=True, slots=True)
class JobFolder:
    """The paths below one job directory. Looks at nothing on the disk unless it says so."""

    root: Path

    @property
    def job_file(self) -> Path:
        return self.root / "job.json"

    @property
    def plan_file(self) -> Path:
        return self.root / "plan.json"

    @property
    def parts(self) -> Path:
        return self.root / "parts"

    @property
    def commits(self) -> Path:
        return self.root / "commits"

    @property
    def attempts(self) -> Path:
        return self.root / "_attempts"

    @property
    def index(self) -> Path:
        return self.root / "index"

    @property
    def runs_file(self) -> Path:
        return self.root / "runs.json"

    @property
    def experts_file(self) -> Path:
        return self.root / "experts.json"

    @property
    def placements(self) -> Path:
        return self.root / "placements"

    @property
    def lock_file(self) -> Path:
        return self.root / ".lock"

    def part(self, split: int) -> Path:
        return self.parts / part_name(split)

    def commit(self, split: int, revision: int) -> Path:
        return self.commits / commit_name(split, revision)

    def create(self) -> None:
        """Makes the folders that are missing. JobError where that is not possible."""
        for folder in (self.root, self.parts, self.commits, self.attempts):
            with storage_errors("creating", folder):
                folder.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSplit:
    """Rows `first_row` to `first_row + num_rows - 1` of the job, written as one part."""

    index: int
    first_row: int
    num_rows: int


def part_name(split: int) -> str:
    return f"part-{split:06d}.parquet"


def commit_name(split: int, revision: int) -> str:
    return f"{split:06d}.json" if revision == 0 else f"{split:06d}.r{revision}.json"


def parse_commit_name(name: str) -> tuple[int, int] | None:
    """(split, revision), or None where `commit_name` could not have given that name."""
    match = _COMMIT_NAME.fullmatch(name)
    if match is None:
        return None
    split, revision = int(match[1]), int(match[2] or 0)
    return (split, revision) if commit_name(split, revision) == name else None


def attempt_name(split: int, revision: int) -> str:
    """A name that no other attempt has, also when several workers try the same split at once."""
    return f"part-{split:06d}.r{revision}.{uuid.uuid4().hex}.parquet"


def write_job(folder: JobFolder, *, fingerprint: str, document: dict[str, Any]) -> None:
    """job.json: {"fingerprint": ..., and whatever else `document` says, such as the resolved spec}."""
    with storage_errors("writing", folder.job_file):
        replace_file(folder.job_file, seal({"fingerprint": fingerprint, **document}), drafts=folder.attempts)


def read_job(folder: JobFolder) -> dict[str, Any]:
    """What `write_job` wrote. JobError if it is missing or damaged."""
    return _read_with_fingerprint(folder.job_file)


def write_plan(folder: JobFolder, *, fingerprint: str, splits: list[dict[str, Any]], document: dict[str, Any]) -> None:
    """plan.json: {"fingerprint", "splits", and whatever else `document` says}.

    A split is a JSON object with at least `index`, `first_row` and `num_rows`; further keys (file, start) are its
    source's business. Splits are listed by index, from 0, and their rows follow each other without a gap.
    """
    parse_splits(splits)
    with storage_errors("writing", folder.plan_file):
        replace_file(
            folder.plan_file, seal({"fingerprint": fingerprint, **document, "splits": splits}), drafts=folder.attempts
        )


def read_plan(folder: JobFolder) -> dict[str, Any]:
    """What `write_plan` wrote. JobError if it is missing or damaged."""
    return _read_with_fingerprint(folder.plan_file)


def parse_splits(splits: list[dict[str, Any]]) -> list[PlannedSplit]:
    """ValueError unless the splits are numbered from 0 and cover the rows from 0 without gap or overlap."""
    planned: list[PlannedSplit] = []
    next_row = 0
    for number, split in enumerate(splits):
        one = PlannedSplit(index=split["index"], first_row=split["first_row"], num_rows=split["num_rows"])
        if one.index != number or one.first_row != next_row or one.num_rows < 1:
            raise ValueError(
                f"split {number} of the plan is {one}; expected index {number}, first_row {next_row} and some rows"
            )
        next_row += one.num_rows
        planned.append(one)
    return planned


def _read_with_fingerprint(path: Path) -> dict[str, Any]:
    document = read_sealed(path)
    if not isinstance(document.get("fingerprint"), str):
        raise JobError(f"{path} is not a gristmill file: it has no fingerprint")
    return document
