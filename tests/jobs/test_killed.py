"""Jobs whose processes die at any moment: running them again gives what an undisturbed one gives."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from pipeline.audit import audit
from tests.jobs.processes import outliving

pytestmark = pytest.mark.ray

TEXTS = [f"text number {row}" for row in range(64)]


@pytest.fixture(scope="module")
def kept():
    return []


@pytest.fixture
def undisturbed(job, run_job, rows_of, tmp_path, kept):
    """What the job gives when nothing happens to it; run once, since it does not depend on where it lies."""
    if not kept:
        kept += rows_of(run_job(job(TEXTS, output={"path": str(tmp_path / "undisturbed"), "rows_per_split": 8})).out)
    return kept


def wait_for_commits(out: Path, num_commits: int, process, timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while len(list(out.glob("commits/*.json"))) < num_commits:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no commits"
        time.sleep(0.02)


def test_jobs_with_a_ray_of_their_own_survive_interrupts_and_kills(
    undisturbed, job, run_job, rows_of, controller, shards_of, cheap_model, tmp_path
):
    """Ctrl-C at a terminal reaches every process of its group; a killed controller takes its Ray and actors along."""
    cheap_model(step_s=0.4, rows_a_step=4)
    interrupted, killed = (
        job(TEXTS, output={"path": str(tmp_path / name), "rows_per_split": 8}) for name in ("interrupted", "killed")
    )
    first, second = controller(interrupted, address=None), controller(killed, address=None)

    wait_for_commits(tmp_path / "interrupted", 2, first.process)
    tree = psutil.Process(first.process.pid).children(recursive=True)
    os.killpg(first.process.pid, signal.SIGINT)
    wait_for_commits(tmp_path / "killed", 2, second.process)
    (shard,) = shards_of(psutil.Process(second.process.pid))
    node = shard.parent()
    second.process.kill()
    assert outliving([shard, node]) == [], "an actor and its node outlive the controller"
    status, stdout, stderr = first.end()
    assert (status, stdout) == (130, ""), stderr
    assert "Traceback" not in stderr
    assert outliving(tree) == []

    cheap_model()
    for settings in (interrupted, killed):
        out = Path(settings["output"]["path"])
        assert 0 < len(rows_of(out)) < 64
        result = run_job(settings)
        assert rows_of(out) == undisturbed
        assert audit(out).ok
        assert result.report["rows"] == {"total": 64, "done": 64, "ok": 64, "errors": 0}


def test_a_controller_killed_again_and_again_loses_and_repeats_nothing(
    undisturbed, job, run_job, rows_of, controller, cheap_model, ray_cluster
):
    cheap_model(step_s=0.1, rows_a_step=4)
    settings = job(TEXTS)
    out = Path(settings["output"]["path"])
    chance = random.Random(7)
    for _ in range(2):
        killed = controller(settings, address=ray_cluster)
        wait_for_commits(out, len(list(out.glob("commits/*.json"))) + 1, killed.process)
        time.sleep(chance.random() * 0.3)
        killed.kill_tree()
        rows = rows_of(out)
        assert len({(row["row"], row["sample"]) for row in rows}) == len(rows), "nothing is there twice"
    cheap_model()
    run_job(settings)
    assert rows_of(out) == undisturbed
    assert audit(out).ok


AT_PUBLICATION = """
from pipeline.commits import CommitLog
publish = CommitLog.publish
def dies(self, commit):
    if commit.split == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    publish(self, commit)
CommitLog.publish = dies
"""

IN_THE_INDEX = """
from pipeline.index.row_map import RowMapWriter
RowMapWriter.contents = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""

BEFORE_THE_REPORT = """
import jobs.finishing
jobs.finishing.write_report = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("before", [AT_PUBLICATION, IN_THE_INDEX, BEFORE_THE_REPORT])
def test_a_job_killed_at_its_most_delicate_steps_is_finished_by_the_next_run(
    undisturbed, job, run_job, rows_of, controller, ray_cluster, before
):
    settings = job(TEXTS)
    out = Path(settings["output"]["path"])
    status, _, stderr = controller(settings, address=ray_cluster, before=before).end()
    assert status == -signal.SIGKILL, stderr
    if before is AT_PUBLICATION:
        assert (out / "commits" / "000003.json").exists()
        assert not (out / "parts" / "part-000003.parquet").exists()
    assert not (out / "report.json").exists()
    result = run_job(settings)
    assert rows_of(out) == undisturbed
    assert audit(out).ok
    assert result.report["index"]["vectors"] == 128
    assert list((out / "_attempts").iterdir()) == []
