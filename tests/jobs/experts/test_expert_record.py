"""What experts did is kept over runs, each counted once, however often it is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jobs.experts.expert_record import ExpertRecord, read_experts
from jobs.experts.expert_tally import GangWork
from pipeline.job_folder import JobFolder
from workers.parallel.expert_work import ExpertWork


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    folder = JobFolder(tmp_path)
    folder.create()
    return folder


def gang(*rows: int) -> GangWork:
    return GangWork("worker-0.0", nodes={0: "a"}, work={0: ExpertWork(rows={0: np.array(rows)})})


def rows(folder: JobFolder) -> list[list[int]] | None:
    experts = read_experts(folder)
    return None if experts is None else experts["rows"]


def test_runs_add_up_and_what_a_run_wrote_before_gives_way(folder: JobFolder) -> None:
    first = ExpertRecord(folder)
    first.keep([])
    assert rows(folder) is None
    first.keep([gang(1, 2)])
    first.keep([gang(3, 4)])
    assert rows(folder) == [[3, 4]]
    ExpertRecord(folder).keep([gang(10, 10)])
    assert rows(folder) == [[13, 14]]


def test_a_damaged_record_is_begun_anew(folder: JobFolder) -> None:
    for damaged in ("{half of it", "[]", "{}"):
        folder.experts_file.write_text(damaged)
        assert rows(folder) is None
    ExpertRecord(folder).keep([gang(1, 2)])
    assert rows(folder) == [[1, 2]]
