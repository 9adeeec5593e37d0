"""`gristmill submit`, `logs` and `cancel`, and what `status` says of a submitted job. Whatever is slow to import is not
imported before a command runs, as in `cli.py`.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.answers import INTERRUPTED
from jobs.terminal import human_seconds, say
from pipeline.errors import UserError

if TYPE_CHECKING:
    from jobs.submitting.ray_jobs import RayJobs, SubmittedJob

JOB_FILE_NAME = "job.yaml"  # as the settings are called where they arrive

Target = Annotated[
    str, typer.Argument(metavar="OUT|ID", help="A job directory, or what submit called the job.", show_default=False)
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The cluster's dashboard, http://HEAD:8265 (or auto, on a machine of it). Otherwise the one that the job "
        "directory remembers, RAY_API_SERVER_ADDRESS or RAY_ADDRESS.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def submit(
    context: typer.Context,
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)],
    address: Address = None,
    output: Annotated[str | None, typer.Option(metavar="DIR", help="Instead of the job's output.path.")] = None,
    folder: Annotated[
        str | None, typer.Option("--dir", metavar="DIR", help="The cluster's folder that relative paths start from.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the first N rows, for now.")] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Run the failed rows again.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Show its log until it ends, and end as it does.")] = False,
    as_json: AsJson = False,
) -> int:
    """Run a job on a cluster, or resume it there, and return at once."""
    from jobs.specfile import dump_spec, load_spec
    from jobs.submitting.ray_jobs import RayJobs
    from jobs.submitting.submission import (
        ADDRESS,
        COMMAND,
        OUTPUT,
        VERSION,
        new_submission_id,
        own_version,
        travelling_spec,
    )

    spec = travelling_spec(load_spec(job, settings or (), output=output), folder)
    cluster = RayJobs(address)
    for other in cluster.jobs_of(spec.output.path):
        if not other.has_ended:
            raise UserError(
                f"{spec.output.path} is {other.id}'s, which is {other.state}; "
                f"stop it with gristmill cancel {other.id} --address {cluster.address}, or wait until it has ended"
            )
    submission_id = new_submission_id(spec.name)
    command = ["gristmill", "run", JOB_FILE_NAME]
    command += [*(["--limit", str(limit)] if limit is not None else []), *(["--retry-errors"] if retry_errors else [])]
    metadata = {OUTPUT: spec.output.path, ADDRESS: cluster.address, COMMAND: context.obj.command_line}
    if (own := own_version()) is not None:
        metadata[VERSION] = own
    cluster.submit(submission_id, shlex.join(command), {JOB_FILE_NAME: dump_spec(spec)}, metadata)
    where = f"{submission_id} --address {cluster.address}"
    words = [f"submitted {submission_id} to {cluster.address}, output {spec.output.path}"]
    words += [f"  gristmill {name} {where}" for name in ("status", "logs --follow", "cancel")]
    answer: dict[str, Any] = {"submission_id": submission_id, "address": cluster.address, "output": spec.output.path}
    if not follow:
        context.obj.answer(answer, "\n".join(words))
        return 0
    print("\n".join(words), flush=True)
    ended = _follow(cluster, submission_id)
    if ended is None:
        say(f"gristmill: {submission_id} goes on; to stop it: gristmill cancel {where}")
        return INTERRUPTED
    context.obj.answer(answer | {"state": ended.state}, describe_submitted(cluster.address, ended))
    return exit_status_of(ended)


def logs(
    target: Target,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
) -> int:
    """What a submitted job has printed; of a job that was run by hand, its run.log."""
    from jobs.submitting.submission import read_submission
    from workers.run_log import RUN_LOG

    out = Path(target)
    if address is None and out.is_dir() and read_submission(out) is None:
        return _print_run_log(out, out / RUN_LOG, follow)
    cluster, submitted = find_submitted(target, address)
    if follow:
        return 0 if _follow(cluster, submitted.id) is not None else INTERRUPTED
    sys.stdout.write(cluster.logs(submitted.id))
    return 0


def cancel(context: typer.Context, target: Target, address: Address = None, as_json: AsJson = False) -> int:
    """Stop a submitted job. What it committed is kept, and submitting it again goes on from there."""
    cluster, submitted = find_submitted(target, address)
    if submitted.has_ended:
        raise UserError(f"{submitted.id} on {cluster.address} is {submitted.state} already")
    ended = cluster.cancel(submitted.id)
    words = [f"{ended.id} is {ended.state}" + ("; what is done is kept" if ended.state == "cancelled" else "")]
    rows = (rows_kept(ended) or {}).get("rows")
    if rows is not None:
        words[0] += f": {rows['done']:,} of {rows['total']:,} rows in {ended.output}"
    elif ended.output is not None:
        words[0] += f" in {ended.output}"
    if ended.command is not None and ended.state == "cancelled":
        words.append(f"to go on: {ended.command}")
    context.obj.answer({"submission": submission_document(cluster.address, ended), "rows": rows}, "\n".join(words))
    return 0


def find_submitted(target: str, address: str | None) -> tuple[RayJobs, SubmittedJob]:
    """The submitted job that is meant by a job directory, here or on the cluster, or by its id. UserError otherwise."""
    from jobs.submitting.ray_jobs import RayJobs
    from jobs.submitting.submission import read_submission

    out = Path(target)
    known = read_submission(out) if out.is_dir() else None
    if known is not None:
        cluster = RayJobs(address or known.address)
        return cluster, cluster.job(known.id)
    if address is None and out.is_dir():
        raise UserError(f"{target}: the last run of this job was not submitted to a cluster, or not by this directory")
    cluster = RayJobs(address)
    if "/" not in target and not out.is_dir():
        return cluster, cluster.job(target)
    found = cluster.jobs_of(str(out.absolute()))
    if not found:
        raise UserError(f"{target}: {cluster.address} knows no job that was submitted to write there")
    return cluster, found[0]


def is_submission_id(target: str) -> bool:
    """Whether it can be nothing else: no path, nothing of that name is here, and the environment names a cluster."""
    from jobs.submitting.ray_jobs import ADDRESS_VARIABLES

    named = any(os.environ.get(variable, "").startswith("http") for variable in ADDRESS_VARIABLES)
    return named and "/" not in target and not Path(target).exists()


def submitted_status(target: str, address: str | None) -> tuple[dict[str, Any], str]:
    """What Ray says of a submitted job, and what its directory says where that can be seen from here."""
    cluster, submitted = find_submitted(target, address)
    document: dict[str, Any] = {"output": submitted.output, "state": submitted.state}
    words = [describe_submitted(cluster.address, submitted)]
    kept = rows_kept(submitted)
    if kept is not None:
        from jobs.status import describe_status

        document = kept | ({} if submitted.has_ended else {"state": submitted.state}) | {"submission": None}
        words.append(describe_status(document))
    elif not submitted.has_ended:
        lines = [line for line in cluster.logs(submitted.id).splitlines() if line.strip()]
        words += [f"last    {lines[-1]}"] if lines else []
        document["last_line"] = lines[-1] if lines else None
    return document | {"submission": submission_document(cluster.address, submitted)}, "\n".join(words)


def rows_kept(submitted: SubmittedJob) -> dict[str, Any] | None:
    """The status of the job's directory; None where that is not on this machine, or not yet."""
    from jobs.status import job_status
    from pipeline.job_folder import JobFolder

    if submitted.output is None or not JobFolder(Path(submitted.output)).job_file.is_file():
        return None
    return job_status(Path(submitted.output))


def submission_document(address: str, submitted: SubmittedJob) -> dict[str, Any]:
    return {
        "id": submitted.id,
        "address": address,
        "state": submitted.state,
        "started_at": _iso(submitted.started_s),
        "ended_at": _iso(submitted.ended_s),
        "exit_status": submitted.exit_status,
        "failure": submitted.failure,
    }


def describe_submitted(address: str, submitted: SubmittedJob) -> str:
    """One line; where the job failed, with the reason."""
    words = f"{submitted.id} on {address}: {submitted.state}"
    if submitted.started_s is not None:
        until = submitted.ended_s if submitted.ended_s is not None else time.time()
        words += (
            f" after {human_seconds(until - submitted.started_s)}"
            if submitted.has_ended
            else (f" for {human_seconds(until - submitted.started_s)}")
        )
    return words + (f": {submitted.failure}" if submitted.failure is not None else "")


def exit_status_of(ended: SubmittedJob) -> int:
    """As if the job had been run here."""
    if ended.state == "finished":
        return 0
    return INTERRUPTED if ended.state == "cancelled" else (ended.exit_status or 1)


def _follow(cluster: RayJobs, submission_id: str) -> SubmittedJob | None:
    """The job as it ended; None if the person no longer wants to look."""

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        return cluster.follow(submission_id, show)
    except KeyboardInterrupt:
        return None


def _print_run_log(out: Path, path: Path, follow: bool) -> int:
    if follow:
        raise UserError(f"{out}: only a submitted job's log can be followed; this one was run by hand: tail -f {path}")
    if not path.is_file():
        raise UserError(f"{out}: no log: the job was not submitted to a cluster, and there is no {path.name}")
    sys.stdout.write(path.read_text(encoding="utf-8", errors="replace"))
    return 0


def _iso(unix_s: float | None) -> str | None:
    return None if unix_s is None else datetime.fromtimestamp(unix_s).astimezone().isoformat(timespec="seconds")
