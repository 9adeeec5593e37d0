"""`gristmill plan` counts what the job would count, says what it does not know, and leaves the disk as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import execute
from jobs.experts.placements import record_calibration
from jobs.plan import make_plan
from jobs.specfile import parse_spec
from jobs.store import open_store
from jobs.terminal import human_bytes
from pipeline.errors import UserError
from workers.parallel.loads import ExpertLoads
from workers.parallel.placement import round_robin

TEXTS = ["A tuple is immutable.", "The with statement closes a file.", "", "Await suspends a coroutine."]


@pytest.fixture
def settings(tiny_model: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "corpus.parquet")
    return {
        "name": "small",
        "model": str(tiny_model("mixtral")),
        "input": {"path": str(tmp_path / "corpus.parquet")},
        "prompt": {"column": "body", "chat": False},
        "generate": {"max_new_tokens": 3, "n": 2},
        "embed": {"template": "passage {{ body }}", "pooling": "mean"},
        "output": {"path": str(tmp_path / "out")},
    }


def test_rows_are_counted_and_their_tokens_sampled(settings: dict[str, Any]) -> None:
    plan = make_plan(parse_spec(settings))
    assert plan.tokens.sampled_rows == 4
    assert plan.tokens.errors == {"empty_prompt": 1}
    assert plan.max_new_tokens == 6


def test_the_memory_of_an_index_is_that_of_its_vectors(settings: dict[str, Any]) -> None:
    plan = make_plan(parse_spec(settings))
    assert plan.dimension == 60
    assert f"index: Flat, {human_bytes(960)} for 4 vectors in 1 shard; building it takes up to" in plan.describe()
    settings["embed"] |= {"dimensions": 8, "routing_weight": 0.5}
    assert make_plan(parse_spec(settings)).dimension == 8 + 4 * 5
    settings["embed"] |= {"dimensions": 61}
    with pytest.raises(UserError, match=r"embed\.dimensions: 61, and the model's hidden states have 60"):
        make_plan(parse_spec(settings))


def test_weights_are_those_of_the_checkpoint(settings: dict[str, Any]) -> None:
    from safetensors import safe_open

    with safe_open(Path(settings["model"]) / "model.safetensors", "np") as file:
        matrices = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    total = sum(shape[0] * shape[1] for shape in matrices if len(shape) == 2)
    total += sum(shape[0] * shape[1] * shape[2] for shape in matrices if len(shape) == 3)
    assert make_plan(parse_spec(settings)).shard.cost.weights == total


def test_a_token_meets_the_experts_it_chooses_and_no_other(settings: dict[str, Any]) -> None:
    cost = make_plan(parse_spec(settings)).shard.cost
    expert = 3 * 60 * 72
    everything_but_embeddings = cost.weights - 2 * cost.output_weights
    assert everything_but_embeddings - cost.weights_a_token == 4 * (5 - 2) * expert


def test_planning_changes_nothing_on_the_disk(
    settings: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import yaml

    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert execute(["plan", str(tmp_path / "job.yaml")]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    words = capfd.readouterr().out
    for said in ("grouped-query", "4 rows in 1 file", "1 empty_prompt", "which is new", "GFLOP/s", "KV cache"):
        assert said in words


def test_it_says_over_how_many_shards_the_experts_are_spread_and_why(settings: dict[str, Any]) -> None:
    words = make_plan(parse_spec(settings)).describe()
    assert "expert_parallel is 1: there is one machine for its experts" in words
    plan = make_plan(parse_spec(settings | {"cluster": {"expert_parallel": 3, "replicas": 2, "threads": 1}}))
    words = plan.describe()
    assert "2 replicas of 3 shards that share the experts" in words
    assert "dealt out in turn: the job is too small to measure loads" in words
    assert "expert_parallel is 3: as the job asks" in words
    assert "a shard:" in words
    joined = make_plan(parse_spec(settings | {"cluster": {"address": "10.0.0.1:6379"}})).describe()
    assert "chosen from its devices and their memory when it is joined" in joined


def test_it_says_where_a_gang_will_hold_the_experts(settings: dict[str, Any], tmp_path: Path) -> None:
    cluster = {"expert_parallel": 2, "threads": 1, "calibration_rows": 3, "spare_experts": 1}

    def outlook(**changes: Any) -> str:
        return make_plan(parse_spec(settings | {"cluster": cluster | changes})).experts

    assert outlook() == (
        "placed by measured loads: 3 rows are read before work begins; "
        "1 more of a layer on each shard, for copies (as the job asks)"
    )
    assert outlook(calibration_rows=0).startswith("dealt out in turn: cluster.calibration_rows is 0")
    assert outlook(expert_parallel=1) == ""
    with open_store(parse_spec(settings)) as store:
        loads = ExpertLoads(layers=(0, 1, 2, 3), num_experts=5)
        found = {"loads": loads.to_json(), "placement": round_robin((0, 1, 2, 3), 5, 2, 4).to_json(), "facts": {}}
        record_calibration(store.folder, ["a", "a"], found, gang="worker-0.0")
    assert outlook() == (
        "where an earlier gang held them (measured loads, which foretold 1.00 times the mean for the busiest shard)"
    )
    assert outlook(expert_parallel=3).startswith("placed by the loads that an earlier gang measured")


def test_no_time_is_made_up_for_another_machine(settings: dict[str, Any]) -> None:
    plan = make_plan(parse_spec(settings | {"cluster": {"address": "10.0.0.1:6379"}}))
    assert plan.seconds is None
    assert "not estimated" in plan.describe()


def test_a_cluster_in_the_environment_is_the_one_that_running_would_join(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    plan = make_plan(parse_spec(settings | {"cluster": {"labels": {"pool": "big"}}}))
    assert plan.layout is None
    assert plan.seconds is None
    assert "on the Ray cluster at 10.0.0.1:6379" in plan.describe()


@pytest.mark.parametrize("wish", [{"labels": {"pool": "big"}}, {"spread": True}, {"wait_s": 5}])
def test_what_only_a_cluster_can_give_is_refused_as_running_would(
    settings: dict[str, Any], wish: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=f"cluster.{next(iter(wish))}: is about the nodes of a cluster"):
        make_plan(parse_spec(settings | {"cluster": wish}))


def test_a_request_that_running_would_refuse_is_refused(
    settings: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import yaml

    settings["prompt"] = {"template": "{{ boddy }}"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    assert execute(["plan", str(tmp_path / "job.yaml")]) == 2
    assert "did you mean 'body'" in capfd.readouterr().err
