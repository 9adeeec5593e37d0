"""Where a job's gangs hold their experts, and the record of it in the job directory: placements/000000.json and on.

Placement changes no result, so it is outside the job's fingerprint. Each generation of each gang is recorded, with the
nodes that it was made for; a gang that forms later, in this run or another, takes over the last one that fits it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.durable import replace_file, storage_errors
from pipeline.job_folder import JobFolder
from workers.forecast import expert_layers
from workers.parallel.placement import Placement, Topology, round_robin


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayers:
    """What is to be placed: `layers` of the decoder are the ones with experts, each with `num_experts`."""

    layers: tuple[int, ...]
    num_experts: int

    @classmethod
    def of(cls, model: Path) -> ExpertLayers:
        """Of a checkpoint. UserError for what is no model."""
        layers, num_experts = expert_layers(model)
        return cls(layers=layers, num_experts=num_experts)


def place_experts(folder: JobFolder, experts: ExpertLayers, nodes: Sequence[str], *, gang: str) -> Placement:
    """A placement for a gang whose ranks are on these nodes, recorded. JobError if the storage fails."""
    placement, origin = last_that_fits(folder, experts, nodes), "an earlier gang's"
    if placement is None:
        placement, origin = first_placement(experts, nodes)
    _record(folder, placement, nodes, gang=gang, origin=origin)
    return placement


def first_placement(experts: ExpertLayers, nodes: Sequence[str]) -> tuple[Placement, str]:
    """The placement of a gang that finds none recorded, and where it comes from, for the record."""
    return round_robin(experts.layers, experts.num_experts, len(nodes)), "round robin"


def last_that_fits(folder: JobFolder, experts: ExpertLayers, nodes: Sequence[str]) -> Placement | None:
    """The one recorded last for these experts and ranks that are spread over nodes in the same way."""
    for path in sorted(folder.placements.glob("*.json"), reverse=True):
        record = _read(path)
        if record is None or Topology.of(record["nodes"]) != Topology.of(nodes):
            continue
        placement = Placement.from_json(record["placement"])
        if (placement.layers, placement.num_experts) == (experts.layers, experts.num_experts):
            return placement
    return None


def record_of(folder: JobFolder, gang: str) -> dict[str, Any] | None:
    """The last record of a gang of that name: of the latest run that had one."""
    for path in sorted(folder.placements.glob("*.json"), reverse=True):
        record = _read(path)
        if record is not None and record.get("gang") == gang:
            return record
    return None


def gang_name(replica: int, generation: int) -> str:
    return f"worker-{replica}.{generation}"


def _read(path: Path) -> dict[str, Any] | None:
    """None for one that is damaged: another placement does as well."""
    try:
        record = json.loads(path.read_text())
        Placement.from_json(record["placement"])
        Topology.of(record["nodes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if isinstance(record, dict) else None


def _record(folder: JobFolder, placement: Placement, nodes: Sequence[str], *, gang: str, origin: str) -> None:
    document = {
        "gang": gang,
        "ranks": placement.num_ranks,
        "nodes": list(nodes),
        "origin": origin,
        "placement": placement.to_json(),
    }
    with storage_errors("recording a placement in", folder.placements):
        folder.placements.mkdir(exist_ok=True)
        number = max((int(path.stem) for path in folder.placements.glob("*.json") if path.stem.isdecimal()), default=-1)
        content = json.dumps(document).encode()
        replace_file(folder.placements / f"{number + 1:06d}.json", content, drafts=folder.attempts)
