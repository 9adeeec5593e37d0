"""A shard that is stopped while it loads is ended; one that is only suspended for a moment isn't."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from workers import sentry

LOADS = """
import sys, time
from workers import sentry
sentry.Sentry()
print("loading", flush=True)
time.sleep(60)
"""


@pytest.fixture
def loading():
    process = subprocess.Popen([sys.executable, "-c", LOADS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's /proc")
def test_a_process_that_is_stopped_while_it_loads_is_ended_within_five_seconds(loading):
    loading.send_signal(signal.SIGSTOP)
    time.sleep(1.2)
    loading.send_signal(signal.SIGCONT)
    time.sleep(1.5)  # for a look or two meanwhile
    assert loading.poll() is None
    began = time.monotonic()
    loading.send_signal(signal.SIGSTOP)
    assert loading.wait(20) == -signal.SIGKILL
    assert time.monotonic() - began > (sentry.STOPPED_LOOKS - 1) * sentry.LOOK_S - 0.1


def test_a_sentry_leaves_when_the_model_is_loaded():
    watcher = sentry.Sentry()
    process = watcher._process
    watcher.leave()
    assert process is None or process.returncode == 0
    watcher.leave()
