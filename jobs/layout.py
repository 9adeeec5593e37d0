"""How many replicas a job gets, of how many ranks each, and of what size: chosen from model, devices and memory. Pure.

A dense model is never spread: each shard holds all of it. A Mixture-of-Experts model is spread over as few ranks as
hold it, since every rank more adds exchanges; what devices are left then make more replicas. On processors the ranks of
one machine would share its memory, so there `auto` spreads over machines or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jobs.experts.spare import spare_experts
from jobs.spec import ClusterSpec
from pipeline.errors import UserError

if TYPE_CHECKING:
    from workers.forecast import Forecast

GPU_SHARE = 0.8  # of a device's memory that weights and the least cache may take; activations and fragments need some
HOST_SHARE = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    num_cpus: int
    num_gpus: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`threads` are each shard's; `memory_bytes` is set aside for each, where its machine can't hold several.

    `sharers`: so many shards may share a machine. `spare_experts`: so many more of a layer than the least on each rank.
    `lacks`: what the nodes that there are can't give, where that is waited for.
    """

    replicas: int
    ranks: int
    device: Literal["cpu", "cuda"]
    threads: int
    sharers: int = 1
    memory_bytes: int = 0
    why: str
    spare_experts: int = 0
    why_spare: str = ""
    lacks: str = ""

    @property
    def num_shards(self) -> int:
        return self.replicas * self.ranks


def choose_layout(
    cluster: ClusterSpec,
    machines: Sequence[Machine],
    *,
    model: Callable[[str], Forecast] | None,
    gpu_bytes: Callable[[], int | None],
) -> Layout:
    """`model` forecasts a shard on a device and is only asked where it matters; None: nothing is known of the model.

    `gpu_bytes`: the memory of one GPU, None where it can't be told. UserError if the devices can't be had, or can't
    hold the model together.
    """
    num_gpus = sum(machine.num_gpus for machine in machines)
    asked = (1 if cluster.replicas == "auto" else cluster.replicas) * (
        1 if cluster.expert_parallel == "auto" else cluster.expert_parallel
    )
    if cluster.device == "cuda" and num_gpus < asked:
        raise UserError(f"cluster.device: cuda needs a GPU for each of {asked} shards, and Ray sees {num_gpus}")
    on_gpus = cluster.device != "cpu" and num_gpus >= max(1, asked)
    places = _Places(
        kind="GPU" if on_gpus else "machine",
        count=num_gpus if on_gpus else max(1, len(machines)),
        share=GPU_SHARE if on_gpus else HOST_SHARE,
    )
    device: Literal["cpu", "cuda"] = "cuda" if on_gpus else "cpu"
    memory_bytes = 0
    least_bytes = min((machine.memory_bytes for machine in machines), default=0)
    if cluster.expert_parallel != "auto":
        ranks, why = cluster.expert_parallel, "as the job asks"
    elif places.count == 1:
        ranks, why = 1, f"there is one {places.kind} for its experts"
    else:
        forecast = model(device) if model is not None else None
        if forecast is None or not forecast.num_experts:
            ranks, why = 1, "the model has no experts to spread"
        else:
            room = gpu_bytes() if on_gpus else least_bytes
            most = places.count if cluster.replicas == "auto" else max(1, places.count // cluster.replicas)
            ranks, why = _fewest_ranks(forecast, places, most, room)
            memory_bytes = forecast.rank_bytes(ranks) if ranks > 1 and not on_gpus else 0
    replicas = max(1, places.count // ranks) if cluster.replicas == "auto" else cluster.replicas
    num_shards = replicas * ranks
    threads = _threads(machines, num_shards) if cluster.threads == "auto" else cluster.threads
    fit = max(1, max((machine.num_cpus for machine in machines), default=1) // threads)
    sharers = num_shards if len(machines) < 2 else min(num_shards, fit)

    def room_of_a_shard() -> int | None:
        room = gpu_bytes() if on_gpus else least_bytes // (1 if memory_bytes else sharers)
        return None if room is None else int(places.share * room)

    spare, why_spare = spare_experts(
        cluster, ranks, model=None if model is None else lambda: model(device), room_bytes=room_of_a_shard
    )
    if memory_bytes and spare and model is not None:
        memory_bytes += spare * model(device).bytes_of_an_expert
    return Layout(
        replicas=replicas,
        ranks=ranks,
        device=device,
        threads=threads,
        sharers=sharers,
        memory_bytes=memory_bytes,
        why=why,
        spare_experts=spare,
        why_spare=why_spare,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """What a rank may have for itself; `share` of its memory can be counted on."""

    kind: str
    count: int
    share: float


def _fewest_ranks(forecast: Forecast, places: _Places, most: int, room: int | None) -> tuple[int, str]:
    """How many ranks, and why so many. UserError if `most` are too few."""
    if room is None:
        raise UserError(
            f"cluster.expert_parallel: auto can't tell how much memory a {places.kind} has; "
            "set it to the number of shards to spread the model's experts over"
        )
    most = min(most, forecast.num_experts)
    limit = f"{places.share:.0%} of a {places.kind}'s {_size(room)}"
    for ranks in range(1, most + 1):
        needed = forecast.rank_bytes(ranks)
        if needed <= places.share * room and ranks == 1:
            return 1, f"it takes {_size(needed)}, which {limit} hold"
        if needed <= places.share * room:
            fewer = f"over {ranks - 1} it would be {_size(forecast.rank_bytes(ranks - 1))}"
            return ranks, f"a shard takes {_size(needed)}, which {limit} hold; {fewer}"
    raise UserError(
        f"model: over {most} {places.kind}s it takes {_size(forecast.rank_bytes(most))} on each, more than {limit}, "
        f"and there are no more to spread it over; add {places.kind}s, or lower cluster.dtype or engine.kv_cache_bytes"
    )


def _threads(machines: Sequence[Machine], num_shards: int) -> int:
    """The most that every shard can have at once; 1 where there are more shards than CPUs."""
    for threads in range(max((machine.num_cpus for machine in machines), default=1), 1, -1):
        if sum(machine.num_cpus // threads for machine in machines) >= num_shards:
            return threads
    return 1


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
