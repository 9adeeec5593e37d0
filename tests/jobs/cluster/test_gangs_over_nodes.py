"""Gangs whose ranks are on several nodes of a real Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.client import DEFAULT_ENGINE

pytestmark = pytest.mark.ray


def placements(out: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(out.glob("placements/*.json"))]


def test_a_gang_over_two_nodes_gives_the_rows_of_one_rank(nodes, moe_job, moe_rows, controller, rows_of):
    settings = moe_job("spread", expert_parallel=2, spread=True)
    out = Path(settings["output"]["path"])
    status, _, stderr = controller(settings, address=nodes.address, engine_factory=DEFAULT_ENGINE).end(120)
    assert status == 0, stderr
    assert rows_of(out) == moe_rows
    (record,) = placements(out)
    assert set(record["nodes"]) == {nodes.id_of("a"), nodes.id_of("b")}
    wait_until(nodes.is_idle, 60)


def test_a_job_waits_for_the_nodes_that_it_names_and_leaves_nothing_on_them_when_it_is_killed(
    nodes, moe_job, moe_rows, controller, rows_of
):
    """As with an autoscaler, which starts a node when something waits for it."""
    settings = moe_job("late", expert_parallel=2, labels={"pool": "!in(a, b)"}, wait_s=90)
    out = Path(settings["output"]["path"])
    running = controller(settings, address=nodes.address, engine_factory=DEFAULT_ENGINE)
    wait_until(lambda: running.process.poll() is not None or "more nodes" in said(out), 120)
    assert "waiting up to 90 seconds for more nodes: cluster: each shard needs 1 CPU, and of the one node" in said(out)
    nodes.add("late", num_cpus=2)
    wait_until(lambda: running.process.poll() is not None or list(out.glob("parts/*.parquet")), 120)
    assert not nodes.is_idle()
    running.kill_tree()
    wait_until(nodes.is_idle, 60)
    (record,) = placements(out)
    assert record["nodes"] == [nodes.id_of("late")] * 2
    rows = rows_of(out)
    assert rows
    assert rows == [row for row in moe_rows if row["row"] in {one["row"] for one in rows}]


def said(out: Path) -> str:
    log = out / "run.log"
    return log.read_text() if log.exists() else ""


def wait_until(condition: Callable[[], Any], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
