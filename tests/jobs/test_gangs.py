"""Jobs of a real Mixture-of-Experts model whose experts lie on several Ray actors: any layout gives the same rows."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from jobs.client import run
from pipeline.audit import audit

pytestmark = pytest.mark.ray


def test_rows_are_the_same_over_several_ranks_and_replicas_and_after_a_rank_was_killed(
    ray_cluster: str,
    moe_job: Callable[..., dict[str, Any]],
    moe_alone: Any,
    moe_rows: list[dict[str, Any]],
    rows_of: Callable[..., list[dict[str, Any]]],
    shards_of: Callable[[psutil.Process], list[psutil.Process]],
    begin_together: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workers.replica.CAUSE_S", 10.0)  # no longer than it takes, on a busy machine
    alone, experts = moe_rows, moe_alone.report["experts"]
    assert (experts["layers"], experts["gangs"]) == ([0, 1, 2, 3], [])
    (chosen,) = {sum(rows) for rows in experts["rows"]}
    assert chosen > 2 * moe_alone.report["runs"][-1]["engine"]["prefill_tokens"], "two experts a token"

    def small_splits(**options: Any) -> dict[str, Any]:
        settings = moe_job("spread", expert_parallel=2, **options)
        settings["output"]["rows_per_split"] = 4
        return settings

    out = Path(small_splits()["output"]["path"])
    killed: list[int] = []

    def kill_a_rank() -> None:
        while not list(out.glob("commits/*.json")):
            time.sleep(0.005)
        for process in shards_of(psutil.Process())[1:2]:
            process.send_signal(signal.SIGKILL)
            killed.append(process.pid)

    killer = threading.Thread(target=kill_a_rank, daemon=True)
    killer.start()
    result = run(small_splits(engine={"max_sequences": 2}), limit=42)
    killer.join(10)
    assert killed
    assert result.report["rows"]["done"] == 42
    (death,) = result.report["runs"][-1]["deaths"]
    assert death["unheard_s"] < 5, "sooner than by its silence; a busy machine is given its time"
    assert death["recovered_after_s"] < 60
    assert "worker process died" in death["reason"], "and not what the survivors felt of it"
    assert rows_of(out) == alone[:42]
    records = [json.loads(path.read_text()) for path in sorted((out / "placements").glob("*.json"))]
    assert [record["gang"] for record in records] == ["worker-0.0", "worker-0.1"]
    assert records[0]["placement"] == records[1]["placement"]

    earlier = len(result.report["experts"]["gangs"])
    begin_together(2)
    result = run(small_splits(replicas=2))
    assert rows_of(out) == alone
    assert audit(out).ok
    layout, engine = (result.report["runs"][-1][key] for key in ("layout", "engine"))
    assert (layout["replicas"], layout["ranks"]) == (2, 2)
    assert engine["exchanges"] > 0
    gangs = result.report["experts"]["gangs"][earlier:]
    assert len(gangs) == 2
    for gang in gangs:
        assert np.shape(gang["rows"]) == (4, 2)
        assert gang["nodes"] == [0, 0]
        assert 1 <= gang["balance"]["achieved"] < 2
        assert gang["bytes"]["within"] > 0 == gang["bytes"]["across"]


def test_a_row_that_kills_its_gang_is_found_and_what_shared_the_gang_with_it_is_served(
    run_job: Callable[..., Any],
    job: Callable[..., dict[str, Any]],
    tiny_model: Callable[..., Path],
    rows_of: Callable[..., list[dict[str, Any]]],
) -> None:
    """The engine computes nothing; its gang has two ranks, each of which takes the other along."""
    texts = ["DIE" if row == 5 else f"text number {row}" for row in range(16)]
    settings = job(texts, model=str(tiny_model("mixtral")), prompt={"column": "body", "chat": False}, embed=None)
    settings |= {
        "cluster": {"threads": 1, "expert_parallel": 2},
        "output": {"path": settings["output"]["path"], "rows_per_split": 2},
    }
    result = run_job(settings)
    rows = rows_of(result.out)
    assert {row["row"]: row["error_code"] for row in rows if row["error_code"]} == {5: "worker_killed"}
    assert [row["row"] for row in rows] == list(range(16))
    run = result.report["runs"][-1]
    assert (run["layout"]["replicas"], run["layout"]["ranks"]) == (1, 2)
    assert 4 <= len(run["deaths"]) <= 6
    again = [death["splits_again"] for death in run["deaths"]]
    assert again[0] > 1, "the gang had other splits in hand"
    assert again[2:] == [1] * len(again[2:]), "from the third death on the suspect was alone"
