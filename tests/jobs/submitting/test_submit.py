"""Jobs that are submitted to a Ray cluster which runs already: a real head with its dashboard, started once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.status import describe_status, job_status
from jobs.submitting.ray_jobs import RayJobs
from pipeline.audit import audit
from pipeline.errors import UserError

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef0123456789abcdef"
NUM_ROWS = 240

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(not (BIN / "gristmill").exists(), reason="gristmill is not installed beside this Python"),
]


@dataclass(frozen=True, slots=True)
class Head:
    """A cluster of one machine: `address` for those who join it, `url` for those who submit."""

    address: str
    url: str

    def environment(self, **more: str) -> dict[str, str]:
        path = os.pathsep.join([str(BIN), os.environ["PATH"]])
        ours = {"PYTHONPATH": str(ROOT), "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        unset = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN")
        all_of_them = {name: value for name, value in os.environ.items() if name not in unset} | ours | more
        return {name: value for name, value in all_of_them.items() if value}

    def gristmill(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "jobs", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=self.environment(**environment),
            timeout=240,
        )

    def jobs(self) -> list[dict[str, Any]]:
        """All that ran on it, also those that only joined, as Ray's API lists them."""
        request = urllib.request.Request(f"{self.url}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: list[dict[str, Any]] = json.load(answer)
        return found

    def is_up(self) -> bool:
        try:
            return self.jobs() is not None
        except OSError:
            return False


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(f"/tmp/gristmill-{os.getpid()}")  # short: Ray's sockets lie in it
    gcs, dashboard, agent, client = free_ports(4)
    found = Head(address=f"127.0.0.1:{gcs}", url=f"http://127.0.0.1:{dashboard}")
    options = {
        "node-ip-address": "127.0.0.1",
        "port": gcs,
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "ray-client-server-port": client,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "num-cpus": 2,
        "temp-dir": folder,
        "object-store-memory": 128 << 20,
        "include-log-monitor": "false",
    }
    log = Path(f"{folder}.log")
    with log.open("w") as output:
        process = subprocess.Popen(
            [BIN / "ray", "start", "--head", "--block", "--disable-usage-stats"]
            + [f"--{name}={value}" for name, value in options.items()],
            env=found.environment(),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 180
        while not found.is_up():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield found
    finally:
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in started:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        shutil.rmtree(folder, ignore_errors=True)
        log.unlink()


@pytest.fixture(scope="module")
def job_file(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its paths are relative to its folder."""
    folder = tmp_path_factory.mktemp("shared")
    shutil.copytree(tiny_model("llama"), folder / "model")
    pq.write_table(pa.table({"body": [f"text {row} of a file" for row in range(NUM_ROWS)]}), folder / "rows.parquet")
    settings = {
        "model": "model",
        "input": {"path": "rows.parquet"},
        "prompt": {"column": "body", "chat": False},
        "generate": {"max_new_tokens": 60, "temperature": 0.9},
        "embed": {},
        "output": {"rows_per_split": 8},
        "cluster": {"threads": 1, "dtype": "float32", "device": "cpu", "replicas": 1},
    }
    (folder / "tuples.yaml").write_text(yaml.safe_dump(settings))
    return folder / "tuples.yaml"


@pytest.fixture(scope="module")
def undisturbed(head: Head, job_file: Path) -> Path:
    """The directory of the job after a plain run that joined the cluster."""
    folder = job_file.parent
    paths = [f"model={folder / 'model'}", f"input.path={folder / 'rows.parquet'}", f"cluster.address={head.address}"]
    before = len(head.jobs())
    run = head.gristmill("run", job_file, "--output", folder / "undisturbed", *(f"--set={path}" for path in paths))
    assert run.returncode == 0, run.stderr
    deadline = time.monotonic() + 30
    while (joined := head.jobs()[before:])[0]["status"] == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.2)  # Ray hears that the process has ended after us
    assert [(one["type"], one["status"]) for one in joined] == [("DRIVER", "SUCCEEDED")]
    return folder / "undisturbed"


def wait_for_commits(out: Path, num_commits: int) -> None:
    deadline = time.monotonic() + 240
    while len(list(out.glob("commits/*.json"))) < num_commits:
        assert time.monotonic() < deadline, "no commits"
        time.sleep(0.02)


def test_a_submitted_job_can_be_watched_cancelled_and_submitted_again_and_gives_what_a_plain_run_gives(
    head: Head, job_file: Path, undisturbed: Path, rows_of: Callable[..., list[dict[str, Any]]]
) -> None:
    out = job_file.parent / "out" / "tuples"
    submit = ["submit", job_file, "--dir", job_file.parent, "--address", head.url]
    begun = head.gristmill(*submit, "--set", "engine.max_sequences=1", "--json")  # slowly
    assert begun.returncode == 0, begun.stderr
    submitted = json.loads(begun.stdout)
    name = submitted["submission_id"]
    assert submitted == {"submission_id": name, "address": head.url, "output": str(out)}
    assert name.startswith("tuples-")

    wait_for_commits(out, 1)
    again = head.gristmill(*submit)
    assert again.returncode == 2
    assert f"{out} is {name}'s, which is running" in again.stderr
    seen = json.loads(head.gristmill("status", name, "--address", head.url, "--json").stdout)
    assert (seen["state"], seen["submission"]["state"], seen["submission"]["id"]) == ("running", "running", name)
    assert 0 < seen["rows"]["done"] < NUM_ROWS
    assert f"sent    as {name} to {head.url}" in describe_status(job_status(out))

    cancelled = head.gristmill("cancel", out)
    assert cancelled.returncode == 0, cancelled.stderr
    rows = rows_of(out)
    assert 0 < len(rows) < NUM_ROWS
    assert f"{name} is cancelled; what is done is kept: {len(rows)} of {NUM_ROWS} rows in {out}" in cancelled.stdout
    assert f"to go on: gristmill submit {job_file}" in cancelled.stdout
    logs = head.gristmill("logs", out).stdout
    assert f"stopped; what is done is kept. To go on: gristmill submit {job_file}" in logs
    assert "Traceback" not in logs
    late = head.gristmill("cancel", out)
    assert (late.returncode, late.stdout) == (2, "")
    assert f"{name} on {head.url} is cancelled already" in late.stderr

    resumed = head.gristmill(*submit, "--follow")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"{NUM_ROWS} of {NUM_ROWS} rows done" in resumed.stdout
    assert "finished after" in resumed.stdout.splitlines()[-1]
    assert len(rows_of(out)) == NUM_ROWS
    assert rows_of(out)[: len(rows)] == rows
    assert rows_of(out) == rows_of(undisturbed)
    assert audit(out).ok


def test_what_a_cluster_can_t_do_is_said_in_one_line(head: Head, job_file: Path) -> None:
    folder = job_file.parent
    submit = ["submit", job_file, "--dir", folder, "--address", head.url]
    failed = head.gristmill(*submit, "--set=model=/no/such/model", f"--output={folder / 'failed'}", "--follow")
    assert failed.returncode == 2
    last = failed.stdout.splitlines()[-1]
    assert ": failed after" in last
    assert "model: /no/such/model: no such file or folder" in last
    refused = {
        f"{head.url} knows no such job": head.gristmill("status", "tuples-0", "--address", head.url, RAY_AUTH_MODE=""),
        "knows no job that was submitted to write there": head.gristmill("logs", "/no/out", "--address", head.url),
        f"{head.url} wants the cluster's token": head.gristmill(
            "status", "tuples-0", RAY_AUTH_TOKEN=TOKEN[::-1], RAY_API_SERVER_ADDRESS=head.url
        ),
    }
    for said, done in refused.items():
        assert said in done.stderr
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr


def test_an_address_that_is_ray_s_own_and_not_the_dashboard_s_is_refused(head: Head) -> None:
    with pytest.raises(UserError, match=r"^--address http://.*: that is not a Ray dashboard"):
        RayJobs(f"http://{head.address}")
