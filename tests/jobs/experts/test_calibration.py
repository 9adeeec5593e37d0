"""A job whose prompts choose a few experts most of the time: its gangs find that out and place experts by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.client import run

pytestmark = pytest.mark.ray

NUM_ROWS = 64


def records(out: Path | str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(Path(out, "placements").glob("[0-9]*.json"))]


def test_a_gang_places_experts_by_what_the_jobs_prompts_choose(
    ray_cluster: str, skewed_job: Callable[..., dict[str, Any]], rows_of: Callable[..., list[dict[str, Any]]]
) -> None:
    alone = rows_of(run(skewed_job("alone", expert_parallel=1)).out)
    assert len({row["text"] for row in alone}) > NUM_ROWS / 2

    settings = skewed_job("spread", calibration_rows=16, spare_experts=1)
    out = settings["output"]["path"]

    def go_on(ranks: int, limit: int | None) -> dict[str, Any]:
        cluster = settings["cluster"] | {"expert_parallel": ranks}
        report: dict[str, Any] = run(settings | {"cluster": cluster}, limit=limit).report
        assert rows_of(out) == alone[:limit]
        return report

    (gang,) = go_on(2, limit=32)["experts"]["gangs"]
    balance, facts = gang["balance"], gang["calibration"]
    assert gang["origin"] == "measured loads"
    assert balance["round_robin"] > 1.3
    assert balance["achieved"] < 1.15
    assert balance["achieved"] == pytest.approx(balance["predicted"], abs=0.1)
    assert 0 < gang["bytes"]["within"] < 1.2 * gang["bytes"]["round_robin"]["within"]
    assert facts["rows"] == 16
    assert 0 < facts["moving_s"] < facts["seconds"]

    # The next run takes over what was found; other ranks do, too, by the loads that are known.
    first, second = go_on(2, limit=40)["experts"]["gangs"]
    third = go_on(3, limit=None)["experts"]["gangs"][-1]
    assert [found["calibration"] for found in (first, second, third)] == [facts, None, None]
    assert third["balance"]["achieved"] < 0.8 * third["balance"]["round_robin"]
    recorded = records(out)
    assert [record["ranks"] for record in recorded] == [2, 2, 3]
    assert [record["taken_over"] for record in recorded] == [False, True, False]
    assert recorded[0]["placement"] == recorded[1]["placement"]


def test_gangs_that_die_while_they_calibrate_are_replaced_and_in_the_end_by_one_that_does_not(
    ray_cluster: str,
    skewed_job: Callable[..., dict[str, Any]],
    biased_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workers.replica.CAUSE_S", 10.0)  # no longer than it takes, on a busy machine
    model = Path(shutil.copytree(biased_model, tmp_path / "model"))
    (model / "deaths").write_text("2")
    settings = skewed_job("mended", model=model, expert_parallel=2, calibration_rows=4)
    result = run(settings, engine_factory="dying_engine:load", limit=8)
    deaths = result.report["runs"][-1]["deaths"]
    assert len(deaths) == 2
    assert all("worker process died" in death["reason"] for death in deaths)
    assert result.report["rows"]["ok"] == 8
    (record,) = records(result.out)
    assert (record["gang"], record["origin"]) == ("worker-0.2", "round robin")

    result = run(settings, engine_factory="dying_engine:load")
    assert result.report["rows"]["ok"] == NUM_ROWS
    assert records(result.out)[-1]["origin"] == "measured loads", "the next run tries again"
