"""Ray's job submission, as the dashboard of a cluster offers it over HTTP: what is asked of it, and errors in one line.

Everything here runs on the person's machine. Ray's own client does the work; nothing of a cluster is joined.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs.submitting.submission import COMMAND, OUTPUT
from pipeline.errors import JobError, UserError, one_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # which Ray's client lets win over what it is given
ANSWER_S = 10.0  # for the dashboard to say anything at all
STOPPING_S = 60  # for a job to stop by itself, before Ray kills it
POLL_S = 0.3
NOT_FOUND = 127  # what a shell exits with when there is no such command

State = Literal["waiting", "running", "finished", "failed", "cancelled"]
_STATES: dict[str, State] = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "SUCCEEDED": "finished",
    "FAILED": "failed",
    "STOPPED": "cancelled",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmittedJob:
    """One job as Ray's job submission knows it. `output` and `command` are known of those that we submitted."""

    id: str
    state: State
    started_s: float | None  # Unix time
    ended_s: float | None
    exit_status: int | None
    failure: str | None  # one line, where state is failed
    output: str | None
    command: str | None

    @property
    def has_ended(self) -> bool:
        return self.state in ("finished", "failed", "cancelled")


class RayJobs:
    """The jobs of the cluster whose dashboard is at `address`. UserError from each method if it can't be talked to."""

    def __init__(self, address: str | None) -> None:
        """`address`: a URL, `auto` for a cluster that this machine is part of; None: what the environment says."""
        self.address = _checked_address(address)
        with self._asking():
            from ray._private.authentication import authentication_token_setup as tokens
            from ray.job_submission import JobSubmissionClient

            # Where a token is it is sent, also without RAY_AUTH_MODE; a cluster that wants none doesn't mind.
            tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
            self._client: JobSubmissionClient = JobSubmissionClient(self.address)

    def submit(self, submission_id: str, entrypoint: str, files: Mapping[str, str], metadata: dict[str, str]) -> None:
        """Have `entrypoint` run on the head, in a folder that holds `files`. Returns when Ray has the job."""
        with tempfile.TemporaryDirectory(prefix="gristmill-") as folder, self._asking():
            for name, text in files.items():
                Path(folder, name).write_text(text, encoding="utf-8")
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=submission_id,
                runtime_env={"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOPPING_S)}},
                metadata=metadata,
            )

    def job(self, submission_id: str) -> SubmittedJob:
        """UserError if there is none of that name."""
        with self._asking(submission_id):
            return _submitted_job(self._client.get_job_info(submission_id))

    def jobs_of(self, output: str) -> list[SubmittedJob]:
        """All that were submitted to write into a job directory, the latest first."""
        with self._asking():
            details = [job for job in self._client.list_jobs() if (job.metadata or {}).get(OUTPUT) == output]
        details = [job for job in details if job.submission_id is not None]
        return [_submitted_job(job) for job in sorted(details, key=lambda job: -(job.start_time or 0))]

    def logs(self, submission_id: str) -> str:
        """All that the job has printed so far."""
        with self._asking(submission_id):
            return str(self._client.get_job_logs(submission_id))

    def follow(self, submission_id: str, show: Callable[[str], None]) -> SubmittedJob:
        """Show what the job prints until it ends, and return what became of it."""

        async def tail() -> None:
            async for text in self._client.tail_job_logs(submission_id):
                show(text)

        with self._asking(submission_id):
            asyncio.run(tail())
        return self._ended(submission_id, time.monotonic() + ANSWER_S)

    def cancel(self, submission_id: str) -> SubmittedJob:
        """Ask the job to stop, wait until it has ended, and return what became of it."""
        with self._asking(submission_id):
            self._client.stop_job(submission_id)
        return self._ended(submission_id, time.monotonic() + STOPPING_S + ANSWER_S)

    def _ended(self, submission_id: str, deadline: float) -> SubmittedJob:
        while not (job := self.job(submission_id)).has_ended:
            if time.monotonic() > deadline:
                raise JobError(f"{submission_id} on {self.address} is still {job.state}; ask gristmill status again")
            time.sleep(POLL_S)
        return job

    @contextmanager
    def _asking(self, submission_id: str = "") -> Iterator[None]:
        """What Ray's client raises -> UserError where the person can mend it, else JobError."""
        try:
            with _quiet_ray():
                yield
        except (UserError, JobError):
            raise
        except Exception as error:
            if type(error).__name__ == "AuthenticationError":
                raise UserError(
                    f"{self.address} wants the cluster's token: put it into ~/.ray/auth_token or RAY_AUTH_TOKEN, "
                    "and leave RAY_AUTH_MODE unset or at token"
                ) from error
            if submission_id and "does not exist" in str(error):
                raise UserError(f"{submission_id}: {self.address} knows no such job") from error
            if isinstance(error, OSError | ValueError):  # also those of requests
                raise UserError(f"{self.address} does not answer as a Ray dashboard: {one_line(error)}") from error
            raise JobError(f"Ray at {self.address} refused: {one_line(error)}") from error


def _submitted_job(details: Any) -> SubmittedJob:
    metadata = details.metadata or {}
    state = _STATES[str(details.status.value)]
    return SubmittedJob(
        id=details.submission_id,
        state=state,
        started_s=details.start_time / 1000 if details.start_time else None,
        ended_s=details.end_time / 1000 if details.end_time else None,
        exit_status=details.driver_exit_code,
        failure=_failure(details.driver_exit_code, details.message or "") if state == "failed" else None,
        output=metadata.get(OUTPUT),
        command=metadata.get(COMMAND),
    )


def _failure(exit_status: int | None, message: str) -> str:
    """Ray's message quotes the end of the log; the line that says why is ours, or else the last."""
    if exit_status == NOT_FOUND:
        return (
            "there is no command gristmill on the cluster's head: install it there, and start Ray with its folder in "
            "PATH (docs/cluster.md)"
        )
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    ours = [line.removeprefix("gristmill: ") for line in lines if line.startswith("gristmill: ")]
    return (ours or lines or ["it does not say why"])[-1]


def _checked_address(given: str | None) -> str:
    """The URL of a dashboard that something listens at."""
    address, origin = given, "--address"
    for variable in ADDRESS_VARIABLES:
        if address is None and os.environ.get(variable):
            address, origin = os.environ[variable], variable
    if address is None:
        raise UserError("which cluster? Name its dashboard with --address, such as --address http://HEAD:8265")
    if address == "auto":
        return _own_dashboard()
    if not address.startswith(("http://", "https://")):
        raise UserError(f"{origin} {address}: name the cluster's dashboard, such as http://HEAD:8265")
    url = address.rstrip("/")
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=ANSWER_S).close()
    except urllib.error.HTTPError:
        return url  # something answers, and Ray's client says what it makes of it
    except urllib.error.URLError as error:
        why = getattr(error.reason, "strerror", None) or error.reason
        raise UserError(f"{origin} {address}: nothing answers there ({why})") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{origin} {address}: that is not a Ray dashboard ({type(error).__name__})") from error
    return url


def _own_dashboard() -> str:
    from ray.dashboard.utils import ray_address_to_api_server_url

    try:
        with _quiet_ray():
            return str(ray_address_to_api_server_url("auto"))
    except Exception as error:
        raise UserError(f"--address auto: this machine is part of no Ray cluster ({one_line(error)})") from error


@contextmanager
def _quiet_ray() -> Iterator[None]:
    """Within, Ray's client says nothing of its own, and what it is given is not overridden by the environment."""
    before = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    silenced = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(silenced)
        os.environ.update(before)
