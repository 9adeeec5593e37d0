"""On which nodes of a cluster a job's shards may be: those that it names and that have room."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from jobs.cluster import feasibility, node_labels
from jobs.cluster.nodes import Node, living_nodes, out_of_reach
from jobs.layout import Layout
from jobs.spec import ClusterSpec
from pipeline.errors import UserError
from workers.replica import Location, Resources

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ground:
    """What a gang may form on just now. `usable` nodes are named by the job, alive and within reach."""

    usable: list[Node]
    location: Location

    @property
    def rooms(self) -> dict[str, Mapping[str, float]]:
        """Node id -> what it has in all, by Ray's names."""
        return {node.id: node.resources for node in self.usable}


def survey(cluster: ClusterSpec) -> Ground:
    """Takes a second where a node can't be reached, which Ray itself may take for alive for a minute yet."""
    nodes = living_nodes()
    lost = {node.id for node in out_of_reach(nodes)}
    named = [node for node in nodes if node_labels.matches(cluster.labels, node.labels)]
    return Ground([node for node in named if node.id not in lost], own_location(cluster, lost))


def own_location(cluster: ClusterSpec, avoided: Collection[str] = ()) -> Location:
    """Where the job wants its gangs to be, but for some nodes, by id."""
    return Location(labels=node_labels.without_nodes(cluster.labels, avoided), apart=cluster.spread)


def candidates(cluster: ClusterSpec) -> list[Node]:
    """The nodes that the job means. Those without CPUs, if there are others, take no shard. UserError for no node."""
    nodes = living_nodes()
    if cluster.wait_s is None:
        node_labels.refuse_no_match(cluster.labels, [node.labels for node in nodes])
    named = [node for node in nodes if node_labels.matches(cluster.labels, node.labels)]
    return [node for node in named if node.machine.num_cpus] or named


def judge(nodes: Sequence[Node], needs: Resources, layout: Layout, cluster: ClusterSpec) -> Layout:
    """The layout, with what the candidates lack for it. UserError if that is anything and the job isn't to wait."""
    machines = [node.machine for node in nodes]
    lacks = feasibility.complaint(layout, needs, machines, apart=cluster.spread, labels=cluster.labels) or ""
    if lacks and cluster.wait_s is None:
        raise UserError(lacks)
    if lacks:
        log.warning("waiting up to %.0f seconds for more nodes: %s", cluster.wait_s, lacks)
    return replace(layout, lacks=lacks)


def hosts(nodes: Sequence[Node], needs: Resources) -> list[Node]:
    """Those on which a shard may come to lie."""
    return [node for node in nodes if feasibility.room_for(needs, node.machine)]


def refuse_wishes_of_nodes(cluster: ClusterSpec) -> None:
    """UserError for what only a cluster can give, where there is none."""
    for key, wish in (("labels", cluster.labels), ("spread", cluster.spread), ("wait_s", cluster.wait_s)):
        if wish:
            raise UserError(
                f"cluster.{key}: is about the nodes of a cluster, and this job starts a Ray of its own on this machine "
                "alone; set cluster.address or RAY_ADDRESS, or leave it out"
            )
