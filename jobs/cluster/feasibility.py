"""Whether a cluster's nodes could ever give what a job's gangs ask for. Pure.

A placement group that no set of nodes can hold waits for ever, and says nothing; so it is found before there is one.
What counts is what nodes have in all: what other jobs hold now, they give back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jobs.cluster.node_labels import describe
from jobs.layout import Layout, Machine

if TYPE_CHECKING:
    from workers.replica import Resources


def complaint(
    layout: Layout, needs: Resources, machines: Sequence[Machine], *, apart: bool, labels: Mapping[str, str]
) -> str | None:
    """Why there is no room for all shards at once, and how to mend it; None where there is.

    `apart`: the shards of one replica are each on a machine of their own. `labels`: what the machines were chosen by.
    """
    rooms = [room_for(needs, machine) for machine in machines]
    there = f"the {len(machines)} nodes{describe(labels)}" if len(machines) != 1 else f"the one node{describe(labels)}"
    if not any(rooms):
        most = ", ".join(_amounts(needs, machines))
        return (
            f"cluster: each shard needs {needs}, and of {there} none has it (at most: {most}); {_mend(layout, needs)}"
        )
    wanted = layout.replicas * layout.ranks
    shards = (
        f"{wanted} shards of {needs}"
        if layout.replicas == 1
        else (f"{layout.replicas} replicas of {layout.ranks} shards, {needs} each,")
    )
    if apart and (places := sum(min(room, layout.replicas) for room in rooms)) < wanted:
        return (
            f"cluster.spread: {shards} need {wanted} places on nodes that are not their own replica's, and {there} "
            f"have {places}; set cluster.spread: false, or fewer cluster.expert_parallel or cluster.replicas"
        )
    if not apart and sum(rooms) < wanted:
        return f"cluster: {shards} are asked for, and {there} have room for {sum(rooms)}; {_mend(layout, needs)}"
    return None


def room_for(needs: Resources, machine: Machine) -> int:
    """How many shards that need so much a machine holds at once."""
    counts = [
        int(has // amount)
        for has, amount in (
            (machine.num_cpus, needs.num_cpus),
            (machine.num_gpus, needs.num_gpus),
            (machine.memory_bytes, needs.memory_bytes),
        )
        if amount
    ]
    assert counts, "a shard that needs nothing has room without end"
    return min(counts)


def _amounts(needs: Resources, machines: Sequence[Machine]) -> list[str]:
    amounts = [f"{max((machine.num_cpus for machine in machines), default=0)} CPUs"]
    if needs.num_gpus:
        amounts.append(f"{max((machine.num_gpus for machine in machines), default=0)} GPUs")
    if needs.memory_bytes:
        amounts.append(f"{max((machine.memory_bytes for machine in machines), default=0) / 2**30:,.1f} GiB")
    return amounts


def _mend(layout: Layout, needs: Resources) -> str:
    settings = [name for name, value in (("replicas", layout.replicas), ("expert_parallel", layout.ranks)) if value > 1]
    if needs.num_cpus > 1:
        settings.insert(0, "threads")
    lower = " or ".join(f"cluster.{name}" for name in settings)
    wait = "cluster.wait_s where an autoscaler brings nodes"
    return f"set {lower} lower, or {wait}" if lower else f"add nodes that have it, or set {wait}"
