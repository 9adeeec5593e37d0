"""Replicas that run one job after another: the model is loaded once, and no job feels the one before it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import jobs
from pipeline.errors import JobError, UserError
from tests.jobs.processes import outliving

pytestmark = pytest.mark.ray

Shards = Callable[[psutil.Process], list[psutil.Process]]


def ended(processes: set[psutil.Process]) -> bool:
    """Whether these are gone, or go soon: Ray kills without waiting for it."""
    return outliving(processes) == []


def living(shards_of: Shards) -> set[psutil.Process]:
    return set(shards_of(psutil.Process()))


def test_a_gang_runs_a_second_job_as_if_it_had_just_been_formed(
    ray_cluster: str,
    moe_job: Callable[..., dict[str, Any]],
    moe_alone: Any,
    moe_rows: list[dict[str, Any]],
    rows_of: Callable[..., list[dict[str, Any]]],
    shards_of: Shards,
) -> None:
    with jobs.WarmReplicas() as warm:
        first = jobs.run(moe_job("first", max_new_tokens=3, expert_parallel=2), warm=warm, limit=20)
        gang = living(shards_of)
        assert len(gang) == 2
        second = jobs.run(moe_job("second", expert_parallel=2), warm=warm)
        assert living(shards_of) == gang
        assert rows_of(second.out) == moe_rows
        assert len(rows_of(first.out)) == 20
        counted, of_first, of_alone = (
            sum(map(sum, result.report["experts"]["rows"])) for result in (second, first, moe_alone)
        )
        assert abs(counted - of_alone) < of_first / 2, "counted from its own start; how many prefixes are found varies"
        (record,) = (json.loads(path.read_text()) for path in (second.out / "placements").glob("*.json"))
        assert record["taken_over"]
        assert record["gang"] == "worker-0.0"

        alone = jobs.run(moe_job("third", expert_parallel=1), warm=warm, limit=8)
        assert rows_of(alone.out) == moe_rows[:8]
        assert ended(gang), "what holds something else makes room"
        last = living(shards_of)
        assert len(last) == 1
    assert ended(last)


def test_what_broke_is_not_kept_and_what_was_only_asked_wrongly_costs_the_next_job_nothing(
    run_job: Callable[..., Any],
    job: Callable[..., dict[str, Any]],
    rows_of: Callable[..., list[dict[str, Any]]],
    shards_of: Shards,
    tmp_path: Path,
) -> None:
    def settings(name: str, texts: list[str], **changes: Any) -> dict[str, Any]:
        made = job(texts, **changes)
        source = tmp_path / f"{name}.parquet"
        (tmp_path / "rows.parquet").rename(source)
        return made | {
            "input": {"path": str(source)},
            "output": {"path": str(tmp_path / name), "rows_per_split": 4},
        }

    with jobs.WarmReplicas() as warm:
        first = run_job(settings("first", [f"one {row}" for row in range(9)], index={"kind": "Flat"}), warm=warm)
        [shard] = living(shards_of)
        second = run_job(settings("second", [f"two {row}" for row in range(9)]), warm=warm)
        assert living(shards_of) == {shard}
        assert [row["text"][-4:] for row in rows_of(second.out)] == [f" {row}.0" for row in range(9)]
        assert rows_of(first.out)[3]["text"] != rows_of(second.out)[3]["text"]

        with pytest.raises(JobError, match="max_error_rate"):
            run_job(settings("third", ["FAIL", "FAIL", "FAIL"]), warm=warm)
        run_job(settings("fourth", ["DIE", *(f"four {row}" for row in range(9))]), warm=warm)
        assert ended({shard})
        [survivor] = living(shards_of)
        run_job(settings("fifth", ["five"]), warm=warm)
        assert living(shards_of) == {survivor}
        run_job(settings("sixth", ["six"], engine={"max_context": 64}), warm=warm)
        assert ended({survivor}), "another engine is another replica"
        with pytest.raises(UserError, match=r"cluster.address: 10\.0\.0\.1:6379, but these replicas are kept on"):
            run_job(settings("seventh", ["seven"], cluster={"address": "10.0.0.1:6379"}), warm=warm)
