"""Signals to the command's whole process group, as `timeout`, supervisors and a terminal's Ctrl-C send them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.audit import audit
from tests.jobs.processes import outliving

ROOT = Path(__file__).parents[2]
COMMAND = """
import sys
import jobs.client
jobs.client.run.__kwdefaults__["engine_factory"] = "cheap_engine:load"
from jobs.cli import main
main()
"""


@pytest.fixture
def command(tmp_path):
    """`command(settings, ...)`: `gristmill run` of the cheap engine, in a process group of its own.

    `settings` None: the job file is there already.
    """
    begun = []

    def begin(settings, *options):
        if settings is not None:
            (tmp_path / "job.json").write_text(json.dumps(settings))  # which is YAML too
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "workers")])}
        environment.pop("RAY_ADDRESS", None)
        begun.append(
            subprocess.Popen(
                [sys.executable, "-c", COMMAND, "run", str(tmp_path / "job.json"), *options],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return begun[-1]

    yield begin
    for process in begun:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait_until(condition, process, timeout_s=180.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.ray
def test_sigterm_to_the_whole_group_stops_cleanly_loses_nothing_and_leaves_no_process(
    command, job, cheap_model, run_job, rows_of, tmp_path
):
    cheap_model(step_s=0.3, rows_a_step=4)
    settings = job([f"text number {row}" for row in range(64)])
    out = Path(settings["output"]["path"])
    process = command(settings)
    wait_until(lambda: len(list(out.glob("commits/*.json"))) >= 2, process)
    tree = psutil.Process(process.pid).children(recursive=True)
    began = time.monotonic()
    for _ in range(2):  # to the process and then to its group
        os.killpg(process.pid, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert time.monotonic() - began < 30, "Ray itself gives up after a minute when it was killed"
    assert (process.returncode, stdout) == (130, ""), stderr
    (line,) = stderr.splitlines()
    assert line == f"gristmill: stopped; what is done is kept. To go on: gristmill run {tmp_path / 'job.json'}"
    assert outliving(tree) == []
    stopped = rows_of(out)
    assert 16 <= len(stopped) < 64

    cheap_model()
    run_job(settings)
    rows = rows_of(out)
    assert [row["row"] for row in rows] == list(range(64))
    assert [row for row in rows if row["row"] in {one["row"] for one in stopped}] == stopped
    assert audit(out).ok


def test_a_command_that_is_stopped_before_it_began_says_how_to_go_on(command, tmp_path):
    job_file = tmp_path / "job.json"
    os.mkfifo(job_file)
    process = command(None, "--json")
    with job_file.open("w"):  # once it is about to read it
        for _ in range(2):
            os.killpg(process.pid, signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    words = f"stopped; to go on: gristmill run {job_file} --json"
    assert json.loads(stdout) == {"error": words, "exit_status": 130}
    assert stderr.splitlines() == [f"gristmill: {words}"]


@pytest.mark.parametrize("moment", ["atexit.register(send)", "last = type('Last', (), {'__del__': send})()"])
def test_a_signal_that_comes_while_a_command_ends_does_not_change_its_exit_status(moment):
    # the second of two that are one wish can come this late on a busy machine
    ending = f"""
import atexit, os, signal, sys
from jobs import cli
def stopped(arguments):
    try:
        send()
    except KeyboardInterrupt:
        global last
        print("stopped")
        {moment}
        return 130
def send(*_, kill=os.kill, number=signal.SIGTERM, own=os.getpid()):
    kill(own, number)
cli.execute = stopped
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", ending], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "stopped\n", "")


def test_another_signal_ends_a_command_at_once_whose_end_takes_long():
    ending = """
import atexit, sys, time
from jobs import cli
def end():
    print("at its end")
    time.sleep(600)
def execute(arguments):
    atexit.register(end)
    return 1
cli.execute = execute
cli.main()
"""
    process = subprocess.Popen(
        [sys.executable, "-uc", ending], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "at its end\n"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (1, "", "")
