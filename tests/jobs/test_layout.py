"""How many replicas of how many ranks: as asked, or as few as hold the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.layout import Layout, Machine, choose_layout
from jobs.resolve import refuse_spreading
from jobs.spec import ClusterSpec
from jobs.specfile import parse_spec
from pipeline.errors import UserError
from workers.forecast import Forecast, forecast
from workers.settings import EngineSettings

GIB = 1 << 30


@pytest.fixture
def mixtral(tiny_model: Callable[..., Path]) -> Forecast:
    """Of 5 experts; a shard of one rank takes all of `rank_bytes(1)`."""
    return forecast(EngineSettings(model_path=str(tiny_model("mixtral")), dtype="float32"), measures=False)


def lay_out(
    cluster: dict[str, Any], machines: list[Machine], model: Forecast | None = None, gpu_bytes: int | None = None
) -> Layout:
    return choose_layout(
        ClusterSpec(**cluster),
        machines,
        model=None if model is None else lambda device: model,
        gpu_bytes=lambda: gpu_bytes,
    )


@pytest.mark.parametrize(
    ("cluster", "machines", "shards", "threads", "device"),
    [
        ({}, [Machine(num_cpus=8)], (1, 1), 8, "cpu"),
        ({"replicas": 3}, [Machine(num_cpus=8)], (3, 1), 2, "cpu"),
        ({"replicas": 3, "threads": 5}, [Machine(num_cpus=8)], (3, 1), 5, "cpu"),
        ({"replicas": 16}, [Machine(num_cpus=8)], (16, 1), 1, "cpu"),
        ({"replicas": 2, "expert_parallel": 2}, [Machine(num_cpus=8)], (2, 2), 2, "cpu"),
        ({"expert_parallel": 3}, [Machine(num_cpus=8)], (1, 3), 2, "cpu"),
        ({"replicas": 2}, [Machine(num_cpus=8, num_gpus=2)], (2, 1), 4, "cuda"),
        ({"replicas": 3}, [Machine(num_cpus=9, num_gpus=2)], (3, 1), 3, "cpu"),
        ({"expert_parallel": 2}, [Machine(num_cpus=8, num_gpus=4)], (2, 2), 2, "cuda"),
        ({"device": "cpu"}, [Machine(num_cpus=8, num_gpus=2)], (1, 1), 8, "cpu"),
        ({}, [Machine(num_cpus=8), Machine(num_cpus=4)], (2, 1), 4, "cpu"),
        ({"replicas": 1}, [Machine(num_cpus=8), Machine(num_cpus=4)], (1, 1), 8, "cpu"),
    ],
)
def test_what_is_asked_is_given_and_the_rest_shared_out(cluster, machines, shards, threads, device) -> None:
    layout = lay_out(cluster, machines)
    assert ((layout.replicas, layout.ranks), layout.threads, layout.device) == (shards, threads, device)
    assert layout.memory_bytes == 0


def test_shards_that_may_lie_on_one_machine_know_how_many_share_its_memory() -> None:
    one, two = [Machine(num_cpus=2)], [Machine(num_cpus=8), Machine(num_cpus=4)]
    assert lay_out({"replicas": 3, "expert_parallel": 2}, one).sharers == 6
    assert lay_out({"replicas": 2}, two).sharers == 2, "both fit the larger"
    assert lay_out({"replicas": 2, "threads": 5}, two).sharers == 1


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="Ray sees 0"):
        lay_out({"device": "cuda"}, [Machine(num_cpus=8)])
    with pytest.raises(UserError, match="each of 4 shards, and Ray sees 3"):
        lay_out({"device": "cuda", "replicas": 2, "expert_parallel": 2}, [Machine(num_cpus=8, num_gpus=3)])


def test_a_model_is_spread_over_as_few_gpus_as_hold_it_and_the_others_make_replicas(mixtral: Forecast) -> None:
    gpus = [Machine(num_cpus=8, num_gpus=8)]
    whole, third = mixtral.rank_bytes(1), mixtral.rank_bytes(3)
    assert mixtral.rank_bytes(2) > third == mixtral.rank_bytes(4), "2 of 5 experts are what the heaviest of 3 ranks has"
    roomy = lay_out({}, gpus, mixtral, gpu_bytes=int(whole / 0.8) + 1)
    assert (roomy.replicas, roomy.ranks) == (8, 1)
    tight = lay_out({}, gpus, mixtral, gpu_bytes=int(third / 0.8) + 1)
    assert (tight.replicas, tight.ranks, tight.device, tight.memory_bytes) == (2, 3, "cuda", 0)
    assert "over 2 it would be" in tight.why
    with pytest.raises(UserError, match="over 2 GPUs it takes"):
        lay_out({"replicas": 4}, gpus, mixtral, gpu_bytes=int(third / 0.8) + 1)
    with pytest.raises(UserError, match=r"over 5 GPUs it takes .* add GPUs"):
        lay_out({}, gpus, mixtral, gpu_bytes=mixtral.rank_bytes(5) // 2)
    with pytest.raises(UserError, match="can't tell how much memory a GPU has"):
        lay_out({}, gpus, mixtral)


def test_machines_that_are_too_small_share_a_model_and_set_its_memory_aside(mixtral: Forecast) -> None:
    room = int(mixtral.rank_bytes(2) / 0.7) + 1
    machines = [Machine(num_cpus=4, memory_bytes=room + extra) for extra in (5, 0, 9, 0)]
    layout = lay_out({}, machines, mixtral)
    assert (layout.replicas, layout.ranks, layout.threads) == (2, 2, 4)
    assert layout.memory_bytes == mixtral.rank_bytes(2)
    assert lay_out({}, machines[:1], mixtral).ranks == 1, "ranks of one machine would share its memory"


def test_a_rank_holds_the_shared_weights_and_its_experts(mixtral: Forecast) -> None:
    expert = 4 * 3 * 60 * 72
    assert mixtral.expert_bytes == 4 * 5 * expert
    for ranks, held in ((1, 5), (2, 3), (3, 2), (5, 1)):
        assert mixtral.rank_weight_bytes(ranks) == mixtral.weight_bytes - 4 * (5 - held) * expert


def test_a_dense_model_is_not_spread(tiny_model: Callable[..., Path]) -> None:
    dense = forecast(EngineSettings(model_path=str(tiny_model("llama")), dtype="float32"), measures=False)
    layout = lay_out({}, [Machine(num_cpus=8, num_gpus=4)], dense, gpu_bytes=1)
    assert (layout.replicas, layout.ranks) == (4, 1)


@pytest.mark.parametrize(
    ("model_type", "ranks", "expected"),
    [
        ("llama", 2, "cluster.expert_parallel: 2 spreads a model's experts, and .* is a dense model"),
        ("mixtral", 6, "cluster.expert_parallel: 6 shards are more than the 5 experts"),
    ],
)
def test_more_ranks_than_experts_are_refused_in_one_line(
    tiny_model: Callable[..., Path], model_type: str, ranks: int, expected: str
) -> None:
    model = tiny_model(model_type)
    settings = {"model": str(model), "input": {"path": "rows"}, "generate": {}, "cluster": {"expert_parallel": ranks}}
    with pytest.raises(UserError, match=expected) as caught:
        refuse_spreading(parse_spec(settings), model)
    assert "\n" not in str(caught.value)
