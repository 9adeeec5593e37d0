"""Two gangs run a job side by side: what happens to one of them is nothing to the other."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pytest

from jobs.client import run
from jobs.controller import Controller
from jobs.fleet import Fleet
from pipeline.audit import audit

pytestmark = pytest.mark.ray


def test_when_a_rank_of_one_gang_is_killed_the_other_goes_on_and_none_of_its_splits_is_done_again(
    ray_cluster, moe_job, rows_of, shards_of, begin_together, monkeypatch
):
    begin_together(2)
    granted = defaultdict(list)  # split -> shards
    steps = defaultdict(list)  # replica -> (when, steps that its first rank had done)
    grant, take = Fleet.grant, Controller._take

    def noted_grant(self, shard, assignments):
        for assignment in assignments:
            granted[assignment.index].append(shard)
        grant(self, shard, assignments)

    def noted_take(self, heard):
        if heard.shard.rank == 0:
            steps[heard.shard.replica].append((time.monotonic(), heard.report.engine.get("steps", 0)))
        return take(self, heard)

    monkeypatch.setattr(Fleet, "grant", noted_grant)
    monkeypatch.setattr(Controller, "_take", noted_take)
    settings = moe_job("beside", expert_parallel=2, replicas=2, max_new_tokens=60, engine={"max_sequences": 2})
    settings["output"]["rows_per_split"] = 4
    out = Path(settings["output"]["path"])
    killed_at: list[float] = []

    def kill_a_rank() -> None:
        while not all(any(done > 20 for _, done in steps[replica]) for replica in (0, 1)):
            time.sleep(0.01)
        shards_of(psutil.Process())[0].kill()
        killed_at.append(time.monotonic())

    killer = threading.Thread(target=kill_a_rank, daemon=True)
    killer.start()
    result = run(settings)
    killer.join(10)
    (death,) = result.report["runs"][-1]["deaths"]
    other = 1 - death["replica"]
    shards = {shard for holders in granted.values() for shard in holders}
    assert {shard.generation for shard in shards if shard.replica == other} == {0}
    for holders in granted.values():
        if holders[0].replica == other:
            assert len(holders) == 1, "a split of the other gang was leased again"
    assert sum(len(holders) - 1 for holders in granted.values()) == death["splits_again"] > 0

    took_s = death["recovered_after_s"]  # None: the other had done all before
    again_at = float("inf") if took_s is None else killed_at[0] + took_s
    meanwhile = [done for when, done in steps[other] if killed_at[0] < when < again_at]
    assert len(set(meanwhile)) > 3, "it did not wait for the other gang to be formed again"
    assert [row["row"] for row in rows_of(out)] == list(range(54))
    assert audit(out).ok
