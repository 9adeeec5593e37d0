"""Jobs that lose processes and nodes in the middle: they end by themselves, with what an undisturbed one gives.

Only what the lost replica had in hand is done again.
"""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.client import DEFAULT_ENGINE
from pipeline.audit import audit
from tests.jobs.processes import outliving

pytestmark = pytest.mark.ray

TEXTS = [f"text number {row}" for row in range(64)]
QUICK = "import jobs.cluster.room; jobs.cluster.room.ROOM_S = 2.0"


def num_commits(out: Path) -> int:
    return len(list(out.glob("commits/*.json")))


def wait_until(condition: Any, what: str, timeout_s: float = 180.0) -> float:
    """How long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, what
        time.sleep(0.01)
    return time.monotonic() - began


def wait_for_commits(out: Path, count: int, process: Any) -> None:
    wait_until(lambda: process.poll() is not None or num_commits(out) >= count, f"{count} commits")
    assert process.poll() is None, process.communicate()


def last_run(out: Path) -> dict[str, Any]:
    run: dict[str, Any] = json.loads((out / "report.json").read_text())["runs"][-1]
    return run


def only_what_was_lost_is_done_again(run: dict[str, Any], num_splits: int) -> bool:
    again = sum(death["splits_again"] for death in run["deaths"])
    return run["splits_leased"] == run["splits_committed"] + again == num_splits + again


@pytest.mark.parametrize("seed", [3])
def test_a_gang_whose_actors_and_node_are_lost_at_random_times_ends_with_the_same_rows_on_fewer_ranks(
    nodes, moe_job, moe_rows, controller, rows_of, shards_of, seed
):
    """An actor is stopped, and a node killed, both of one gang of three."""
    nodes.add("c")
    settings = moe_job("lost", expert_parallel=3, engine={"max_sequences": 2})
    settings["output"]["rows_per_split"] = 2
    out, chance = Path(settings["output"]["path"]), random.Random(seed)
    running = controller(settings, address=nodes.address, engine_factory=DEFAULT_ENGINE, before=QUICK)

    def some_shard() -> psutil.Process:
        (shard,) = shards_of(nodes.raylet(chance.choice("abc")))
        return shard

    for generation, number in enumerate((signal.SIGSTOP, "a node")):
        formed = out / "placements" / f"{generation:06d}.json"
        wait_until(lambda formed=formed: running.process.poll() is not None or formed.exists(), "the gang to form")
        wait_for_commits(out, num_commits(out) + 1, running.process)
        time.sleep(0.2 * chance.random())
        assert running.process.poll() is None
        if number == "a node":
            nodes.kill(chance.choice("abc"))
        else:
            some_shard().send_signal(number)
    status, _, stderr = running.end(180)
    assert status == 0, stderr
    assert rows_of(out) == moe_rows
    assert audit(out).ok

    run = last_run(out)
    stopped, lost = run["deaths"]
    assert "has said nothing for" in stopped["reason"]
    assert 5 <= stopped["unheard_s"] < 20
    assert lost["unheard_s"] < 20
    assert [death.get("ranks") for death in run["deaths"]] == [None, 2]
    assert all(death["recovered_after_s"] < 60 for death in run["deaths"])
    assert only_what_was_lost_is_done_again(run, num_splits=27)
    placements = [json.loads(path.read_text()) for path in sorted(out.glob("placements/*.json"))]
    assert [record["ranks"] for record in placements] == [3, 3, 2]
    assert len({node for record in placements for node in record["nodes"]}) == 3


def cheap_job(job: Any, name: str, tmp_path: Path, **cluster: Any) -> dict[str, Any]:
    """Rows of no model, which take a while."""
    settings: dict[str, Any] = job(TEXTS, output={"path": str(tmp_path / name), "rows_per_split": 4})
    return settings | {"cluster": {"threads": 1} | cluster}


def test_a_replica_whose_node_is_lost_waits_for_another_and_the_others_lose_nothing(
    nodes, job, cheap_model, controller, rows_of, shards_of, tmp_path
):
    cheap_model(step_s=0.4, rows_a_step=2)
    settings = cheap_job(job, "waits", tmp_path, replicas=2)
    out = tmp_path / "waits"
    running = controller(settings, address=nodes.address, before=QUICK)
    both = [nodes.raylet("a"), nodes.raylet("b")]
    wait_until(lambda: all(map(shards_of, both)), "a replica on each node")
    wait_for_commits(out, 2, running.process)
    cheap_model(step_s=2.0, rows_a_step=2)  # until the node is back
    nodes.kill("b")
    wait_until(lambda: "has room for 0 ranks" in (out / "run.log").read_text(), "the replica to wait")
    nodes.mend()
    wait_until(lambda: "there is room for it again" in (out / "run.log").read_text(), "the replica to have room")
    assert num_commits(out) < 16
    cheap_model()
    status, _, stderr = running.end(180)
    assert status == 0, stderr
    assert [row["row"] for row in rows_of(out)] == list(range(64))
    assert audit(out).ok
    run = last_run(out)
    (death,) = run["deaths"]
    assert death["splits_again"] <= 8
    assert only_what_was_lost_is_done_again(run, num_splits=16)


def test_a_job_whose_controller_and_then_its_only_node_are_killed_holds_nothing_and_goes_on_where_commits_end(
    nodes, job, cheap_model, controller, rows_of, shards_of, tmp_path
):
    nodes.add("large", num_cpus=2)
    cheap_model(step_s=0.3, rows_a_step=4)
    settings = cheap_job(job, "ends", tmp_path, threads=2, replicas=1)
    out = tmp_path / "ends"

    running = controller(settings, address=nodes.address)
    wait_for_commits(out, 2, running.process)
    (shard,) = shards_of(nodes.raylet("large"))
    running.process.kill()
    running.process.communicate()
    assert outliving([shard]) == [], "an actor outlives the controller"
    wait_until(nodes.is_idle, "Ray to take back what the controller held")
    first = rows_of(out)
    assert 8 <= len(first) < 64

    running = controller(settings, address=nodes.address, before=QUICK)
    wait_for_commits(out, len(first) // 4 + 1, running.process)
    nodes.kill("large")
    status, _, stderr = running.end(180)
    assert status == 1
    assert stderr.splitlines()[-1].endswith(
        "none of a replica's 1 workers have room on the nodes that are left; what is committed is kept"
    ), stderr
    second = rows_of(out)
    assert len(first) < len(second) < 64

    nodes.remove("large")
    nodes.add("large", num_cpus=2)
    cheap_model()
    status, _, stderr = controller(settings, address=nodes.address).end(180)
    assert status == 0, stderr
    rows = rows_of(out)
    assert [row["row"] for row in rows] == list(range(64))
    assert [row for row in rows if row["row"] in {one["row"] for one in second}] == second
    assert audit(out).ok
    assert last_run(out)["splits_leased"] == 16 - len(second) // 4
