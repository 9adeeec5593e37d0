"""A job whose prompts choose a few experts most of the time: its gangs find that out and place experts by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from jobs.client import run

pytestmark = pytest.mark.ray

NUM_ROWS, NUM_EXPERTS = 64, 8
TEXT = "a tuple is immutable while the with statement closes files when an error occurs inside of it"
FAVOURITES = [3.0, 0.0, 3.0, 0.0, 1.5, 0.0, 1.5, 0.0]  # all of them with the first of two ranks, dealt out in turn


@pytest.fixture(scope="module")
def biased_model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt-oss in small, whose routers have a bias."""
    import torch

    folder = tmp_path_factory.mktemp("biased")
    shutil.copytree(tiny_model("gpt_oss", num_local_experts=NUM_EXPERTS), folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith("router.bias"):
            weights[name] = weights[name] + torch.tensor(FAVOURITES)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def job(biased_model: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`job(name, **cluster)`: rows that are continued and embedded."""
    words = TEXT.split()
    texts = [" ".join(words[row % 11 : row % 11 + 2 + row % 7]) for row in range(NUM_ROWS)]
    pq.write_table(pa.table({"body": texts}), tmp_path / "rows.parquet")

    def make(name: str, *, model: Path = biased_model, **cluster: Any) -> dict[str, Any]:
        return {
            "name": name,
            "model": str(model),
            "input": {"path": str(tmp_path / "rows.parquet")},
            "prompt": {"column": "body", "chat": False},
            "generate": {"max_new_tokens": 6, "temperature": 0.9, "seed": 4},
            "embed": {"of": "both"},
            "output": {"path": str(tmp_path / name), "rows_per_split": 8},
            "engine": {"kv_cache_bytes": "4MiB", "max_sequences": 8},
            "cluster": {"threads": 1, "dtype": "float32", "device": "cpu"} | cluster,
        }

    return make


def records(out: Path | str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(Path(out, "placements").glob("[0-9]*.json"))]


def test_a_gang_places_experts_by_what_the_jobs_prompts_choose(
    ray_cluster: str, job: Callable[..., dict[str, Any]], rows_of: Callable[..., list[dict[str, Any]]]
) -> None:
    alone = rows_of(run(job("alone", expert_parallel=1)).out)
    assert len({row["text"] for row in alone}) > NUM_ROWS / 2

    settings = job("spread", calibration_rows=16, spare_experts=1)
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


def test_a_rank_that_dies_while_its_gang_calibrates_is_replaced(
    ray_cluster: str, job: Callable[..., dict[str, Any]], biased_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(biased_model, tmp_path / "model")
    settings = job("mended", model=model, expert_parallel=2, calibration_rows=4)
    result = run(settings, engine_factory="dying_engine:load", limit=8)
    assert (model / "died").exists()
    (death,) = result.report["runs"][-1]["deaths"]
    assert "worker process died" in death["reason"]
    assert result.report["rows"]["ok"] == 8
    (record,) = records(result.out)
    assert (record["gang"], record["origin"]) == ("worker-0.1", "measured loads")
