"""One controller at a time: refused while the holder lives, free again once it is dead."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import JobError
from pipeline.job_folder import JobFolder
from pipeline.lock import lock, lock_holder

HOLD = """
import subprocess, sys, time
from pathlib import Path
from pipeline.job_folder import JobFolder
from pipeline.lock import lock
with lock(JobFolder(Path(sys.argv[1]))):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    return JobFolder(tmp_path / "out")


@pytest.fixture
def holder(folder: JobFolder) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that holds the job directory, and the pid of a child that it started meanwhile."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder.root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    yield process, child
    process.kill()
    process.wait()
    process.stdout.close()
    os.kill(child, signal.SIGKILL)


def test_a_second_run_is_refused_with_the_holders_name(
    folder: JobFolder, holder: tuple[subprocess.Popen[str], int]
) -> None:
    with pytest.raises(JobError) as caught, lock(folder):
        pass
    expected = rf"in use by process {holder[0].pid} on {re.escape(socket.gethostname())} since 20\d\d-.*"
    assert re.search(expected, str(caught.value))
    assert "\n" not in str(caught.value)
    found = lock_holder(folder)
    assert found is not None
    assert found.pid == holder[0].pid


def test_a_dead_holder_does_not_keep_the_lock_even_while_its_children_live(
    folder: JobFolder, holder: tuple[subprocess.Popen[str], int]
) -> None:
    holder[0].kill()
    holder[0].wait()
    os.kill(holder[1], 0)  # the child is alive
    assert lock_holder(folder) is None
    with lock(folder):
        pass


def test_the_lock_is_free_after_its_block_and_after_an_error_in_it(folder: JobFolder) -> None:
    with lock(folder), pytest.raises(JobError, match="in use"), lock(folder):
        pass
    with pytest.raises(ZeroDivisionError), lock(folder):
        raise ZeroDivisionError
    with lock(folder):
        pass
    assert lock_holder(folder) is None


def test_a_forked_child_neither_keeps_the_lock_nor_takes_it_away(folder: JobFolder) -> None:
    with lock(folder):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        ended = os.fork()
        if ended == 0:
            os._exit(0)
        os.waitpid(ended, 0)
        assert lock_holder(folder) is not None
    try:
        with lock(folder):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_asking_who_holds_a_folder_that_is_not_there_makes_nothing(folder: JobFolder) -> None:
    assert lock_holder(folder) is None
    assert not folder.root.exists()
