"""A job on its way to a cluster: what travels, by which name it goes there, and what its directory keeps of that.

`gristmill submit` sends the job's settings as a file; on the cluster's head, Ray starts `gristmill run` on it and puts
into that process's environment what it was submitted with. The run writes it into the job directory, submission.json,
so that `status`, `logs` and `cancel` find the submission by the directory alone. Knows no Ray.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

from jobs.spec import JobSpec
from pipeline.durable import replace_file, storage_errors
from pipeline.errors import UserError
from pipeline.job_folder import JobFolder
from pipeline.locations import is_uri

SUBMISSION_FILE = "submission.json"
RAY_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # the variable in which Ray tells a submitted job its metadata
RAY_SUBMISSION_ID = "job_submission_id"  # Ray's own key there; ours follow
OUTPUT, ADDRESS, COMMAND, VERSION = (f"gristmill_{name}" for name in ("output", "address", "command", "version"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """`id` is Ray's. What may be None is not known of a job that was submitted without `gristmill submit`."""

    id: str
    address: str | None = None  # of the cluster's dashboard, as the submitter reached it
    command: str | None = None  # submits the job again
    version: str | None = None  # the submitter's gristmill


def own_version() -> str | None:
    """The version of gristmill that is installed here; None where this is a tree that isn't."""
    try:
        return version("gristmill")
    except PackageNotFoundError:
        return None


def new_submission_id(name: str) -> str:
    """The job's name, as far as it can be part of a file's name, and eight digits that tell two submissions apart."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)[:40].strip('.-') or 'job'}-{secrets.token_hex(4)}"


def travelling_spec(spec: JobSpec, folder: str | None = None) -> JobSpec:
    """The job as it can be read on another machine: every path absolute, relative ones from `folder` there.

    UserError where a path depends on the machine or the folder that the job is submitted from, and where the job names
    a cluster of its own.
    """
    if spec.cluster.address not in (None, "auto"):
        raise UserError(
            f"cluster.address {spec.cluster.address}: a submitted job runs on the cluster that it is submitted to; "
            "leave it out, or override it with --set cluster.address=auto"
        )
    if folder is not None and not folder.startswith("/"):
        raise UserError(f"--dir {folder}: must be an absolute path, of a folder on the cluster")
    if is_uri(spec.output.path):
        raise UserError(f"output.path {spec.output.path}: output goes to a shared filesystem; name a folder")
    paths = spec.input.path
    if isinstance(paths, tuple):
        paths = tuple(_there("input.path", path, folder) for path in paths)
    elif paths is not None:
        paths = _there("input.path", paths, folder)
    job = _there("input.job", spec.input.job, folder) if spec.input.job is not None else None
    output = _there("output.path", spec.output.path, folder)
    return spec.model_copy(
        update={
            "model": _there("model", spec.model, folder),
            "input": spec.input.model_copy(update={"path": paths, "job": job}),
            "output": spec.output.model_copy(update={"path": output}),
            "cluster": spec.cluster.model_copy(update={"address": None}),
        }
    )


def _there(key: str, path: str, folder: str | None) -> str:
    """The path as the cluster's machines see it."""
    if path.startswith("/") or "://" in path:
        return path
    if path.startswith("~"):
        raise UserError(f"{key} {path}: it is not known whose home that would be on the cluster; write it out from /")
    if folder is None:
        raise UserError(
            f"{key} {path}: a relative path means nothing on another machine; write it out from /, or say with "
            "--dir DIR which folder of the cluster it is relative to"
        )
    return str(PurePosixPath(folder, path))


def current_submission(environment: Mapping[str, str] = os.environ) -> Submission | None:
    """Of the job that this process runs; None where Ray was not asked to run it."""
    try:
        metadata = json.loads(environment.get(RAY_JOB_CONFIG, "{}")).get("metadata", {})
    except (ValueError, AttributeError):
        return None
    if not isinstance(metadata, dict) or not isinstance(metadata.get(RAY_SUBMISSION_ID), str):
        return None
    return Submission(
        id=metadata[RAY_SUBMISSION_ID],
        address=metadata.get(ADDRESS),
        command=metadata.get(COMMAND),
        version=metadata.get(VERSION),
    )


def note_submission(folder: JobFolder) -> None:
    """Write into the job directory as what it is run now; where it was not submitted, remove what was said before."""
    submission = current_submission()
    path = folder.root / SUBMISSION_FILE
    with storage_errors("writing", path):
        if submission is None:
            path.unlink(missing_ok=True)
        else:
            content = json.dumps(asdict(submission), indent=2).encode() + b"\n"
            replace_file(path, content, drafts=folder.attempts)


def read_submission(out: Path) -> Submission | None:
    """What the last run of the job directory was submitted as; None where it was started by hand."""
    try:
        document = json.loads((out / SUBMISSION_FILE).read_text(encoding="utf-8"))
        return Submission(**{name: document[name] for name in ("id", "address", "command", "version")})
    except (OSError, ValueError, KeyError, TypeError):
        return None
