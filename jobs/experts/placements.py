"""Where a job's gangs hold their experts, and the record of it in the job directory: placements/000000.json and on.

Placement changes no result, so it is outside the job's fingerprint. Each generation of each gang is recorded, with the
nodes that it was made for; a gang that forms later, in this run or another, takes over the last one that fits it. Where
none does, loads that an earlier gang measured (placements/loads.json) place experts for other ranks, too. Where there
are no loads yet, experts are dealt out in turn and the gang calibrates: it measures, and moves its experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.spec import JsonObject
from pipeline.durable import replace_file, storage_errors
from pipeline.job_folder import JobFolder
from workers.parallel.loads import ExpertLoads
from workers.parallel.measured import place_by_loads, predicted_balance
from workers.parallel.placement import Placement, Topology, round_robin
from workers.parallel.seat import Seating

MEASURED = "measured loads"
DEALT_OUT = "round robin"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayers:
    """What is to be placed: `layers` of the decoder are the ones with experts, each with `num_experts`."""

    layers: tuple[int, ...]
    num_experts: int

    @classmethod
    def of(cls, model: Path) -> ExpertLayers:
        """Of a checkpoint. UserError for what is no model."""
        from workers.forecast import expert_layers  # brings torch

        layers, num_experts = expert_layers(model)
        return cls(layers=layers, num_experts=num_experts)

    def least_slots(self, num_ranks: int) -> int:
        """Of a rank, so that all experts have one."""
        return -(-self.num_experts // num_ranks)


def place_experts(
    folder: JobFolder,
    experts: ExpertLayers,
    nodes: Sequence[str],
    *,
    gang: str,
    spare_slots: int = 0,
    calibrates: bool = False,
) -> Seating:
    """A placement for a gang whose ranks are on these nodes, recorded, unless the gang is to calibrate first.

    `spare_slots`: so many more than the least on each rank. `calibrates`: loads are to be measured. JobError if the
    storage fails.
    """
    slots = min(experts.least_slots(len(nodes)) + spare_slots, experts.num_experts)
    record = last_that_fits(folder, experts, nodes, slots=slots, origin=MEASURED if calibrates else None)
    if record is not None:
        record_kept(folder, record, nodes, gang=gang)
        return Seating(placement=Placement.from_json(record["placement"]))
    loads = read_loads(folder, experts) if calibrates else None
    if loads is not None:
        placement = place_by_loads(loads, Topology.of(nodes), slots)
        _record(folder, _document(placement, nodes, gang=gang, origin=MEASURED, loads=loads))
        return Seating(placement=placement)
    is_filled = calibrates or spare_slots > 0
    placement = round_robin(experts.layers, experts.num_experts, len(nodes), slots if is_filled else None)
    if not calibrates:
        _record(folder, _document(placement, nodes, gang=gang, origin=DEALT_OUT))
    return Seating(placement=placement, calibrates=calibrates)


def record_calibration(folder: JobFolder, nodes: Sequence[str], found: Mapping[str, Any], *, gang: str) -> None:
    """Record what a gang's calibration found: a `workers.calibrator.Calibration` as JSON. JobError as above."""
    loads = ExpertLoads.from_json(found["loads"])
    placement = Placement.from_json(found["placement"])
    with storage_errors("recording loads in", folder.placements):
        folder.placements.mkdir(exist_ok=True)
        replace_file(loads_file(folder), json.dumps(found["loads"]).encode(), drafts=folder.attempts)
    document = _document(placement, nodes, gang=gang, origin=MEASURED, loads=loads)
    _record(folder, {**document, "calibration": found["facts"]})


def record_kept(folder: JobFolder, record: JsonObject, nodes: Sequence[str], *, gang: str) -> None:
    """Record that a gang stays as another job left it: `record` is that job's last of it. JobError as above."""
    _record(folder, {**record, "gang": gang, "nodes": list(nodes), "taken_over": True, "calibration": None})


def last_that_fits(
    folder: JobFolder, experts: ExpertLayers, nodes: Sequence[str], *, slots: int, origin: str | None = None
) -> JsonObject | None:
    """The record made last for these experts, ranks that are spread over nodes in the same way, and as many slots.

    `origin`: of such a record alone.
    """
    for record in _records(folder):
        placement = Placement.from_json(record["placement"])
        if (
            Topology.of(record["nodes"]) == Topology.of(nodes)
            and (placement.layers, placement.num_experts) == (experts.layers, experts.num_experts)
            and max(len(held) for ranks in placement.slots for held in ranks) <= slots
            and origin in (None, record["origin"])
        ):
            return record
    return None


def record_of(folder: JobFolder, gang: str) -> JsonObject | None:
    """The last record of a gang of that name: of the latest run that had one."""
    return next((record for record in _records(folder) if record.get("gang") == gang), None)


def read_loads(folder: JobFolder, experts: ExpertLayers) -> ExpertLoads | None:
    """What an earlier gang measured. None where none did, or that is damaged: it can be measured again."""
    try:
        loads = ExpertLoads.from_json(json.loads(loads_file(folder).read_text()))
    except (OSError, ValueError):
        return None
    return loads if (loads.layers, loads.num_experts) == (experts.layers, experts.num_experts) else None


def loads_file(folder: JobFolder) -> Path:
    return folder.placements / "loads.json"


def gang_name(replica: int, generation: int) -> str:
    return f"worker-{replica}.{generation}"


def _records(folder: JobFolder) -> list[JsonObject]:
    """The latest first."""
    paths = sorted((path for path in folder.placements.glob("*.json") if path.stem.isdecimal()), reverse=True)
    return [record for path in paths if (record := _read(path)) is not None]


def _read(path: Path) -> JsonObject | None:
    """None for one that is damaged: another placement does as well."""
    try:
        record = json.loads(path.read_text())
        Placement.from_json(record["placement"])
        Topology.of(record["nodes"])
        record["origin"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if isinstance(record, dict) else None


def _document(
    placement: Placement, nodes: Sequence[str], *, gang: str, origin: str, loads: ExpertLoads | None = None
) -> JsonObject:
    return {
        "gang": gang,
        "ranks": placement.num_ranks,
        "nodes": list(nodes),
        "origin": origin,
        "taken_over": False,
        "predicted_balance": None if loads is None else round(predicted_balance(placement, loads), 4),
        "calibration": None,
        "placement": placement.to_json(),
    }


def _record(folder: JobFolder, document: JsonObject) -> None:
    with storage_errors("recording a placement in", folder.placements):
        folder.placements.mkdir(exist_ok=True)
        number = max((int(path.stem) for path in folder.placements.glob("*.json") if path.stem.isdecimal()), default=-1)
        content = json.dumps(document).encode()
        replace_file(folder.placements / f"{number + 1:06d}.json", content, drafts=folder.attempts)
