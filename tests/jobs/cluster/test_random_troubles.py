"""Jobs to which anything happens at any moment: they end by themselves, with the rows of an undisturbed one.

What happens when is drawn from a seed, and printed. Two short ones are always run; longer ones of other seeds with
`GRISTMILL_SEEDS=5,6,7 pytest tests/jobs/cluster/test_random_troubles.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from jobs.client import DEFAULT_ENGINE
from pipeline.audit import audit

pytestmark = pytest.mark.ray

SEEDS = [int(seed) for seed in os.environ.get("GRISTMILL_SEEDS", "").split(",") if seed]
COUNT = 5 if SEEDS else 2
TEXTS = [f"text number {row}" for row in range(96)]
QUICK = "import jobs.cluster.room; jobs.cluster.room.ROOM_S = 2.0"


def ends_well(out: Path, rows: list[dict[str, Any]], undisturbed: list[dict[str, Any]]) -> None:
    assert rows == undisturbed
    assert audit(out).ok
    run = json.loads((out / "report.json").read_text())["runs"][-1]
    again = sum(death["splits_again"] for death in run["deaths"])
    assert run["splits_leased"] == run["splits_committed"] + again, "only what was lost is done again"


@pytest.mark.parametrize("seed", SEEDS or [12])
def test_a_gang_survives_troubles_at_random_times(
    nodes, beside, moe_job, moe_rows, controller, rows_of, shards_of, seed
):
    trouble = beside("trouble")
    settings = moe_job("troubled", expert_parallel=2, wait_s=60, engine={"max_sequences": 2})
    settings["output"]["rows_per_split"] = 2
    out = Path(settings["output"]["path"])

    def start() -> Any:
        return controller(settings, address=nodes.address, engine_factory=DEFAULT_ENGINE, before=QUICK)

    trouble.Troubled(start, nodes, shards_of).endure(trouble.draw(seed, COUNT, mean_s=4.0))
    ends_well(out, rows_of(out), moe_rows)


@pytest.mark.parametrize("seed", SEEDS or [13])
def test_two_replicas_survive_troubles_at_random_times(
    nodes, beside, job, cheap_model, controller, run_job, rows_of, shards_of, tmp_path, seed
):
    trouble = beside("trouble")
    settings = job(TEXTS, output={"path": str(tmp_path / "undisturbed"), "rows_per_split": 4})
    undisturbed = rows_of(run_job(settings).out)
    cheap_model(step_s=0.2, rows_a_step=4)
    out = tmp_path / "troubled"
    settings["output"]["path"] = str(out)
    settings["cluster"] = {"threads": 1, "replicas": 2, "wait_s": 60}

    def start() -> Any:
        return controller(settings, address=nodes.address, before=QUICK)

    trouble.Troubled(start, nodes, shards_of).endure(trouble.draw(seed, COUNT, mean_s=4.0))
    ends_well(out, rows_of(out), undisturbed)
