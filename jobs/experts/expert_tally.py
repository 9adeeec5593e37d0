"""What the experts of a run's shards did, kept while the run goes on, also of gangs that are no more."""

from __future__ import annotations

from dataclasses import dataclass, field

from jobs.events import ShardId
from jobs.experts.placements import gang_name
from workers.assignment import ShardReport
from workers.parallel.expert_work import ExpertWork


@dataclass(slots=True)
class GangWork:
    """One generation of one replica, by rank: Ray's name of its node, and its experts' work as last heard of."""

    gang: str  # as its placement is recorded
    nodes: dict[int, str] = field(default_factory=dict)
    work: dict[int, ExpertWork] = field(default_factory=dict)


class ExpertTally:
    def __init__(self) -> None:
        self._gangs: dict[tuple[int, int], GangWork] = {}

    def take(self, shard: ShardId, report: ShardReport) -> None:
        if report.experts is None:
            return
        gang = self._gangs.setdefault(
            (shard.replica, shard.generation), GangWork(gang_name(shard.replica, shard.generation))
        )
        gang.nodes[shard.rank], gang.work[shard.rank] = report.node, report.experts

    @property
    def gangs(self) -> list[GangWork]:
        """Those that were heard of, in order of replicas and generations."""
        return [gang for _, gang in sorted(self._gangs.items())]
