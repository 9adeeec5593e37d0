"""Each split is committed at most once a revision and parts/ holds committed parts only, whenever the process dies."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.attempt import Attempt, records_to_keep
from pipeline.commits import CommitLog, read_commits
from pipeline.durable import file_sha256
from pipeline.errors import JobError, RowError
from pipeline.job_folder import JobFolder, commit_name, parse_commit_name
from pipeline.parts import PartBuilder
from pipeline.records import RecordLayout

LAYOUT = RecordLayout.of(samples=1, embeds="prompt", dimension=2)
ROWS_A_SPLIT = 3
NUM_SPLITS = 3


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    folder = JobFolder(tmp_path / "out")
    folder.create()
    return folder


def opened(folder: JobFolder) -> CommitLog:
    log = CommitLog(folder, fingerprint="this job")
    log.recover()
    return log


def attempt_at(
    folder: JobFolder, split: int, *, revision: int = 0, num_rows: int = ROWS_A_SPLIT, kept: Any = None, bad: int = -1
) -> Attempt:
    first_row = split * ROWS_A_SPLIT
    builder = PartBuilder(LAYOUT, split=split, first_row=first_row, num_rows=num_rows, revision=revision, kept=kept)
    for row in range(first_row, first_row + num_rows):
        if row == bad:
            builder.fail(row, RowError("internal", "the first time"))
        elif builder.needs(row):
            builder.add(row, text=f"text {row}", finish_reason="stop", prompt_tokens=1, completion_tokens=1)
            builder.add_vector(row, "prompt", np.array([row, 1], np.float32))
    return builder.write(folder)


def run_job(folder: JobFolder) -> None:
    """Split 1 has a bad row that is tried again, split 2 is cut short by a limit and finished later."""
    log = opened(folder)
    for split in range(NUM_SPLITS):
        if split not in log.commits:
            limited = {"num_rows": 1} if split == 2 else {}
            log.publish(log.commit(attempt_at(folder, split, bad=4, **limited)))
    for split in (1, 2):
        before = log.commits[split]
        if before.revision == 0:
            kept = records_to_keep(folder.part(split), before.sha256, retry_errors=True)
            log.publish(log.commit(attempt_at(folder, split, revision=1, kept=kept)))


def check_parts(folder: JobFolder) -> None:
    """What holds at every moment: parts/ reads as one dataset, of parts that a commit stands for, no row twice."""
    if not folder.parts.exists():
        return
    committed = {(commit.part, commit.sha256) for commit in read_commits(folder)}
    assert {(path.name, file_sha256(path)) for path in folder.parts.iterdir()} <= committed
    if any(folder.parts.iterdir()):
        rows = ds.dataset(folder.parts).to_table(columns=["row"])["row"].to_pylist()
        assert rows == sorted(set(rows))


def check_finished(folder: JobFolder) -> None:
    table = ds.dataset(folder.parts).to_table()
    assert table["row"].to_pylist() == list(range(NUM_SPLITS * ROWS_A_SPLIT))
    assert table["text"].to_pylist() == [f"text {row}" for row in range(NUM_SPLITS * ROWS_A_SPLIT)]
    assert sorted(os.listdir(folder.commits)) == ["000000.json", "000001.r1.json", "000002.r1.json"]
    assert sorted(os.listdir(folder.parts)) == [f"part-00000{split}.parquet" for split in range(NUM_SPLITS)]
    assert os.listdir(folder.attempts) == []


def test_a_commit_is_a_document_of_what_was_written(folder: JobFolder) -> None:
    log = opened(folder)
    attempt = attempt_at(folder, 0, bad=1)
    log.publish(log.commit(attempt))
    document = json.loads((folder.commits / "000000.json").read_text())
    expected = {"split": 0, "part": "part-000000.parquet", "rows": 3, "errors": 1, "error_codes": {"internal": 1}}
    assert {name: document[name] for name in expected} == expected
    assert document["sha256"] == file_sha256(folder.parts / "part-000000.parquet")
    assert log.commits == opened(folder).commits


def test_an_attempt_that_was_not_committed_is_no_part(folder: JobFolder) -> None:
    attempt_at(folder, 0)
    log = CommitLog(folder, fingerprint="this job")
    assert log.recover().cleared == 1
    assert log.commits == {}
    assert os.listdir(folder.parts) == os.listdir(folder.attempts) == []


def test_a_split_is_committed_once_at_each_revision(folder: JobFolder) -> None:
    log = opened(folder)
    first, second = attempt_at(folder, 0), attempt_at(folder, 0)
    log.commit(first)
    for late in (first, second):
        with pytest.raises(JobError, match="split 0"):
            log.commit(late)
    with pytest.raises(JobError, match="revision 2"):
        log.commit(attempt_at(folder, 0, revision=2))


def test_a_commit_file_that_is_there_is_never_overwritten(folder: JobFolder) -> None:
    log = opened(folder)
    attempt = attempt_at(folder, 0)
    (folder.commits / "000000.json").write_text("another controller was here")
    with pytest.raises(JobError, match=r"000000\.json"):
        log.commit(attempt)
    assert (folder.commits / "000000.json").read_text() == "another controller was here"


def test_an_attempt_that_this_machine_cannot_see_is_not_committed(folder: JobFolder) -> None:
    log = opened(folder)
    attempt = attempt_at(folder, 0)
    os.unlink(folder.root / attempt.path)
    with pytest.raises(JobError, match="all nodes share"):
        log.commit(attempt)
    assert os.listdir(folder.commits) == []


def test_another_jobs_commit_is_refused(folder: JobFolder) -> None:
    opened(folder).commit(attempt_at(folder, 0))
    with pytest.raises(JobError, match="another job"):
        CommitLog(folder, fingerprint="that job").recover()


@pytest.mark.parametrize("place", range(0, 500, 50))
def test_a_changed_byte_in_a_commit_is_noticed(folder: JobFolder, place: int) -> None:
    opened(folder).commit(attempt_at(folder, 0))
    path = folder.commits / "000000.json"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(JobError, match=r"000000\.json is damaged"):
        opened(folder)


def test_a_commit_under_another_name_is_noticed(folder: JobFolder) -> None:
    opened(folder).commit(attempt_at(folder, 0))
    os.rename(folder.commits / "000000.json", folder.commits / "000001.json")
    with pytest.raises(JobError, match=r"000001\.json is damaged"):
        opened(folder)


def test_a_split_whose_part_someone_removed_is_to_be_run_again(folder: JobFolder) -> None:
    log = opened(folder)
    log.publish(log.commit(attempt_at(folder, 0)))
    os.unlink(folder.part(0))
    again = CommitLog(folder, fingerprint="this job")
    assert again.recover().dropped == (0,)
    assert again.next_revision(0) == 0
    assert os.listdir(folder.commits) == []


def test_attempts_may_be_deleted_when_nothing_runs_even_after_a_crash(folder: JobFolder) -> None:
    """A newer revision was committed, not published, and its file deleted: the older revision still stands."""
    log = opened(folder)
    log.publish(log.commit(attempt_at(folder, 0, num_rows=1)))
    log.commit(attempt_at(folder, 0, revision=1))
    shutil.rmtree(folder.attempts)
    again = CommitLog(folder, fingerprint="this job")
    assert again.recover().dropped == (0,)
    assert (again.commits[0].revision, again.commits[0].rows) == (0, 1)
    check_parts(folder)


def test_a_truncated_part_stops_the_job_with_one_line(folder: JobFolder) -> None:
    log = opened(folder)
    log.publish(log.commit(attempt_at(folder, 0)))
    os.truncate(folder.part(0), 100)
    with pytest.raises(JobError, match=r"part-000000\.parquet is damaged: it has 100 bytes"):
        opened(folder)


def test_a_part_without_a_commit_is_refused_and_left_alone(folder: JobFolder) -> None:
    folder.part(7).write_bytes(b"somebody's")
    with pytest.raises(JobError, match=r"part-000007\.parquet has no commit"):
        opened(folder)
    assert folder.part(7).exists()


def test_storage_that_fails_is_one_line(folder: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    log = opened(folder)
    attempt = attempt_at(folder, 0)

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(JobError, match="no space left") as caught:
        log.commit(attempt)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    log.publish(log.commit(attempt))
    assert os.listdir(folder.parts) == ["part-000000.parquet"]


def test_unwritable_output_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JobError, match=r"output\.path"):
        CommitLog(JobFolder(tmp_path / "file" / "out"), fingerprint="this job").recover()


def test_commit_names_are_read_as_they_are_written() -> None:
    for split, revision in [(0, 0), (3, 1), (1234567, 12)]:
        assert parse_commit_name(commit_name(split, revision)) == (split, revision)
    for name in ["0.json", "000003.r0.json", "000003.r01.json", "0000003.json", "000003.json.tmp", "x.json"]:
        assert parse_commit_name(name) is None


def test_the_commit_is_on_the_disk_before_the_part_is_published(folder: JobFolder, filesystem: Any) -> None:
    log = opened(folder)
    attempt = attempt_at(folder, 0)
    with filesystem.dies_at(None):
        log.publish(log.commit(attempt))
    essential = [step for step in filesystem.trace if step not in ("open", "write")]
    assert essential == ["fsync", "link", "fsync", "unlink", "rename", "fsync"]


def test_whatever_step_the_job_dies_at_running_it_again_finishes_it(tmp_path: Path, filesystem: Any) -> None:
    for step in itertools.count():
        folder = JobFolder(tmp_path / str(step))
        with filesystem.dies_at(step):
            run_job(folder)
        finished = not filesystem.died
        check_parts(folder)
        committed = {commit.split for commit in read_commits(folder)} if folder.commits.exists() else set()
        assert set(opened(folder).commits) == committed
        check_parts(folder)
        run_job(folder)
        check_finished(folder)
        if finished:
            break
    assert step > 70


def test_at_every_step_of_an_undisturbed_job_its_parts_read_right(tmp_path: Path, filesystem: Any) -> None:
    folder = JobFolder(tmp_path / "out")
    filesystem.before_step = lambda: check_parts(folder)
    with filesystem.dies_at(None):
        run_job(folder)
    check_finished(folder)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(deaths=st.lists(st.integers(0, 60), max_size=6), attempts_deleted=st.booleans())
def test_a_job_that_dies_again_and_again_is_finished_in_the_end(
    tmp_path_factory: pytest.TempPathFactory, filesystem: Any, deaths: list[int], attempts_deleted: bool
) -> None:
    folder = JobFolder(tmp_path_factory.mktemp("job") / "out")
    for step in deaths:
        with filesystem.dies_at(step):
            run_job(folder)
        check_parts(folder)
        if attempts_deleted:
            shutil.rmtree(folder.attempts, ignore_errors=True)
    run_job(folder)
    check_finished(folder)


def test_a_process_that_is_killed_leaves_a_job_that_can_be_finished(tmp_path: Path, filesystem: Any) -> None:
    """As above with a real SIGKILL, which no handler and no `finally` survives, at every fifth step."""
    for step in itertools.count(0, 5):
        folder = JobFolder(tmp_path / str(step))
        child = os.fork()
        if child == 0:
            try:
                with filesystem.dies_at(step):
                    filesystem.kill_for_real = True
                    run_job(folder)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        run_job(folder)
        check_finished(folder)
        if not os.WIFSIGNALED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert step > 50
