"""The job directory as the controller knows it: whose it is, what is planned, what is committed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from jobs.events import CommittedSplit
from jobs.resolve import PlannedJob, ResolvedJob, resolve
from jobs.spec import JobSpec, JsonObject
from pipeline.commits import CommitLog
from pipeline.errors import JobError, UserError, one_line
from pipeline.extensions import known_files
from pipeline.index.manifest import parts_digest
from pipeline.index.versions import put_back_locked
from pipeline.job_folder import JobFolder, read_job, read_plan, write_job, write_plan
from pipeline.lock import lock
from pipeline.source import Split
from workers.run_log import run_log

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStore:
    """A job directory that this process holds."""

    folder: JobFolder
    job: ResolvedJob
    date: str  # when the job was planned, ISO 8601: what chat templates print
    log: CommitLog

    def committed(self) -> dict[int, CommittedSplit]:
        return {
            split: CommittedSplit(revision=commit.revision, rows=commit.rows, errors=commit.errors)
            for split, commit in self.log.commits.items()
        }

    def parts_digest(self) -> str:
        """Another whenever a part is."""
        return parts_digest(self.log.commits)

    def report(self) -> JsonObject | None:
        """The last report, if it is about the parts as they are now."""
        try:
            report = json.loads((self.folder.root / "report.json").read_text())
        except (OSError, ValueError):
            return None
        return report if isinstance(report, dict) and report.get("parts_digest") == self.parts_digest() else None


@contextmanager
def open_store(spec: JobSpec) -> Iterator[JobStore]:
    """Resolve the job, take its directory and plan or recover it; what was mended is told in run.log.

    Nothing is written before the model and the input are known to exist. UserError for a directory that holds another
    job, this one in another number format or with other columns, or something else; JobError while another process
    works in it or if the input or the weights have changed.
    """
    folder = JobFolder(Path(spec.output.path).expanduser().absolute())
    job = None
    if not folder.job_file.exists():
        _refuse_foreign(folder)
        job = resolve(spec)  # a job that can't be run leaves nothing behind
    with lock(folder):
        put_back_locked(folder)
        planned = read_planned(folder)
        if planned is not None:
            job, date = resolve(spec, planned, extended_by=known_files(folder)), planned.date
            _refuse_other(folder, job, planned)
        else:
            job, date = job or resolve(spec), datetime.now().astimezone().isoformat(timespec="seconds")
            _plan(folder, job, date)
        commits = CommitLog(folder, fingerprint=job.fingerprint)
        with run_log(folder.root, "controller"):
            _recover(commits)
        yield JobStore(folder=folder, job=job, date=date, log=commits)


def _recover(commits: CommitLog) -> None:
    recovery = commits.recover()
    if recovery.published:
        log.info("committed and not yet in parts/, which is mended: %s", _splits(recovery.published))
    if recovery.dropped:
        log.warning("a committed part is gone, and its rows are done again: %s", _splits(recovery.dropped))


def _splits(numbers: Sequence[int]) -> str:
    return f"split{'s' if len(numbers) > 1 else ''} {_listed([str(number) for number in numbers])}"


def read_planned(folder: JobFolder) -> PlannedJob | None:
    """What an earlier run planned; None where none got that far. JobError if it is damaged."""
    if not folder.job_file.exists():
        return None
    job, plan = read_job(folder), read_plan(folder)
    try:
        return PlannedJob(
            spec=JobSpec.model_validate(job["spec"]),
            fingerprint=job["fingerprint"],
            date=job["planned_at"],
            covers=job["covers"],
            source=plan["source"],
            splits=tuple(Split.from_json(split) for split in plan["splits"]),
        )
    except (ValidationError, KeyError, TypeError) as error:
        raise JobError(f"{folder.job_file} is not of this version of gristmill: {one_line(error)}") from error


def _plan(folder: JobFolder, job: ResolvedJob, date: str) -> None:
    """job.json comes last: where it is, the job is planned."""
    write_plan(
        folder,
        fingerprint=job.fingerprint,
        splits=[split.to_json() for split in job.splits],
        document={"source": job.source.to_json()},
    )
    document = {"spec": job.spec.to_json(), "planned_at": date, "covers": job.covers}
    write_job(folder, fingerprint=job.fingerprint, document=document)


def _refuse_foreign(folder: JobFolder) -> None:
    """A folder that is not a job directory may hold other things, but nothing where this job's are to be."""
    root = folder.root
    if root.exists() and not root.is_dir():
        raise UserError(f"output.path {root} is a file; name a folder")
    for name in ("parts", "commits", "index"):
        if (root / name).is_dir() and any((root / name).iterdir()):
            raise UserError(
                f"output.path {root} has a folder {name}/ but no job.json, so it is not a job's; name another"
            )


def _refuse_other(folder: JobFolder, job: ResolvedJob, planned: PlannedJob) -> None:
    if job.fingerprint == planned.fingerprint:
        if job.spec.cluster.dtype != planned.spec.cluster.dtype:
            raise UserError(
                f"output.path {folder.root} holds this job with cluster.dtype {planned.spec.cluster.dtype}, and rows "
                f"of {job.spec.cluster.dtype} beside those would be another model's; ask for the same or name another "
                "output.path"
            )
        if job.spec.output.columns != planned.spec.output.columns:
            raise UserError(
                f"output.path {folder.root} holds this job with output.columns {_names(planned)}; "
                "ask for the same or name another output.path"
            )
        return
    changes = differences(planned.covers, job.covers)
    sections = {change.partition(".")[0] for change in changes}
    if sections <= {"model"}:
        raise JobError(
            f"the model has changed since the job in {folder.root} was planned: "
            f"{_listed([change.removeprefix('model.') for change in changes])}; "
            "put the old one back or name another output.path"
        )
    raise UserError(
        f"output.path {folder.root} holds another job: {_listed(changes)} "
        f"{'differs' if len(changes) == 1 else 'differ'}; name another output.path, or remove this one"
    )


def _names(planned: PlannedJob) -> str:
    columns = planned.spec.output.columns
    return f"[{', '.join(columns)}]" if columns != "auto" else "auto"


def _listed(changes: list[str]) -> str:
    shown = ", ".join(changes[:3])
    return shown + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")


def differences(before: JsonObject, now: JsonObject, prefix: str = "") -> list[str]:
    """The keys whose values differ, dotted, as deep as both sides are mappings.

    >>> differences({"generate": {"n": 1, "seed": 0}}, {"generate": {"n": 2, "seed": 0}})
    ['generate.n']
    """
    found: list[str] = []
    for key in dict.fromkeys([*before, *now]):
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found.append(f"{prefix}{key}")
    return found
