"""What a kill leaves, or a run that goes on meanwhile, is still to be done: the audit never calls it damage."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import audit as audit_module
from pipeline.attempt import records_to_keep
from pipeline.audit import audit
from pipeline.index.build import build_index
from pipeline.job_folder import JobFolder
from pipeline.lock import lock
from tests.pipeline.audited_job import PROVENANCE, finish, part_of, planned


def test_a_job_under_way_is_not_damaged(tmp_path: Path) -> None:
    """Every state that a kill can leave: nothing of it is called damage, nothing of it is called whole."""
    folder = JobFolder(tmp_path / "out")
    log = planned(folder)

    def pending() -> str:
        found = audit(folder.root)
        assert found.problems == ()
        assert not found.ok
        return " | ".join(found.pending)

    assert "3 of 3 splits, 11 rows, are not done yet" in pending()
    limited = part_of(folder, 0, rows=2)
    log.commit(limited)
    assert "split 0 is committed and its part not yet published" in pending()
    assert "split 0 was cut short by a limit: 2 of its rows are not done yet" in pending()
    log.publish(log.commits[0])
    kept = records_to_keep(folder.part(0), log.commits[0].sha256, retry_errors=False)
    log.commit(part_of(folder, 0, revision=1, kept=kept))
    assert "000000.json was replaced by revision 1" in pending()
    assert "split 0 is committed and its part not yet published" in pending()
    log.publish(log.commits[0])
    log.publish(log.commit(part_of(folder, 1)))
    build_index(folder, log.commits, job="mine", provenance=PROVENANCE)
    assert pending() == "1 of 3 splits, 3 rows, are not done yet"
    log.publish(log.commit(part_of(folder, 2)))
    assert pending() == "the index was built from other parts than those that are committed now"
    shutil.rmtree(folder.index)
    assert pending() == "the index is not built yet, or was removed"
    build_index(folder, log.commits, job="mine", provenance=PROVENANCE)
    assert audit(folder.root).ok
    with lock(folder):
        assert "is running this job just now" in pending()


def test_nothing_that_a_kill_leaves_is_called_damage(tmp_path: Path, filesystem: Any) -> None:
    for step in itertools.count(0, 2):
        folder = JobFolder(tmp_path / str(step))
        with filesystem.dies_at(step):
            finish(folder, planned(folder))
        finished = not filesystem.died
        if folder.commits.exists():
            found = audit(folder.root)
            assert found.problems == ()
            assert found.ok or not finished
        finish(folder, planned(folder))
        assert audit(folder.root).ok
        if finished:
            break
    assert step > 60


def test_a_run_that_goes_on_meanwhile_is_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the audit looks at split 0 the controller commits it anew, and another split for the first time."""
    folder = JobFolder(tmp_path / "out")
    log = planned(folder)
    log.publish(log.commit(part_of(folder, 0, rows=2)))
    look = audit_module.file_sha256

    def look_late(path: Path) -> str:
        if log.commits[0].revision == 0:
            kept = records_to_keep(folder.part(0), log.commits[0].sha256, retry_errors=False)
            log.publish(log.commit(part_of(folder, 0, revision=1, kept=kept)))
            log.publish(log.commit(part_of(folder, 1)))
        return look(path)

    monkeypatch.setattr(audit_module, "file_sha256", look_late)
    found = audit(folder.root)
    assert found.problems == ()
    assert "split 0 was committed again while it was looked at" in found.pending

    listed = os.listdir

    def list_early(path: Any) -> list[str]:
        names = listed(path)
        if path == folder.commits and 2 not in log.commits:
            log.publish(log.commit(part_of(folder, 2)))
        return names

    monkeypatch.setattr(os, "listdir", list_early)
    assert audit(folder.root).problems == ()
