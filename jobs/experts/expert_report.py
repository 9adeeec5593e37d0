"""What the report says of experts: how busy each was, how ranks shared the work, and what another placement had given.

Pure. Balance is the heaviest rank over the mean, over all layers: the time that ranks take who wait for the heaviest in
every layer, over what it would be if none were heavier. L layers, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.spec import JsonObject
from jobs.terminal import human_bytes
from workers.parallel.placement import Placement, Topology, round_robin
from workers.parallel.prediction import expected_traffic, overall_imbalance, rank_loads

if TYPE_CHECKING:
    from jobs.experts.expert_tally import GangWork

Counts = NDArray[np.int64]

MAX_GANGS = 50  # that a report keeps, the latest


def expert_report(
    earlier: JsonObject | None, gangs: Sequence[GangWork], record_of: Callable[[str], Mapping[str, Any] | None]
) -> JsonObject | None:
    """`earlier`, the report after the runs before, with this run's gangs; None where no experts did anything.

    {"layers": decoder layers [L], "rows": tokens that chose each expert [L][E], in all runs together, "gangs": [...]}.
    Each gang of several ranks has {"gang", "nodes": [R] the number of each rank's node, "origin" of its placement,
    "rows": what each rank computed [L][R], "balance": {"predicted", "achieved", "round_robin"}, "bytes": {"within",
    "across", "round_robin": {...}}, "calibration"}. `round_robin` is what experts dealt out in turn, with as many slots
    a rank, would have given for the same routing. `record_of` finds a gang's record in placements/ by its name.
    """
    found = earlier
    for gang in gangs:
        layers = sorted({layer for work in gang.work.values() for layer in work.rows})
        if not layers:
            continue
        rows = [
            np.sum([work.rows[layer] for work in gang.work.values() if layer in work.rows], axis=0) for layer in layers
        ]
        record = record_of(gang.gang) if len(gang.work) > 1 else None
        told = [] if record is None else _gang(gang, layers, np.array(rows), record)
        found = _added(found, layers, [counts.tolist() for counts in rows], told)
    return found


def _added(found: JsonObject | None, layers: list[int], rows: list[list[int]], gangs: list[JsonObject]) -> JsonObject:
    if found is None or found["layers"] != layers:
        return {"layers": layers, "rows": rows, "gangs": gangs}
    together = [
        [one + more for one, more in zip(before, after, strict=True)]
        for before, after in zip(found["rows"], rows, strict=True)
    ]
    return {"layers": layers, "rows": together, "gangs": [*found["gangs"], *gangs][-MAX_GANGS:]}


def _gang(gang: GangWork, layers: list[int], loads: Counts, record: Mapping[str, Any]) -> list[JsonObject]:
    """loads [L, E]. Nothing of a gang of which not all ranks were heard."""
    placement = Placement.from_json(record["placement"])
    if len(gang.work) != placement.num_ranks or placement.layers != tuple(layers):
        return []
    if any(work.rows.keys() != set(layers) for work in gang.work.values()):  # it died before a rank's first step
        return []
    ranks = range(placement.num_ranks)
    topology = Topology.of([gang.nodes[rank] for rank in ranks])
    busy = np.array([[int(gang.work[rank].rows[layer].sum()) for rank in ranks] for layer in layers])  # [L, R]
    within, across = moved([gang.work[rank].bytes_to for rank in ranks], topology)
    dealt = dealt_out(placement)
    dealt_within, dealt_across = expected_traffic(dealt, topology, loads).bytes_moved(gang.work[0].row_bytes)
    return [
        {
            "gang": gang.gang,
            "nodes": list(topology.node_of),
            "origin": record["origin"],
            "rows": busy.tolist(),
            "balance": {
                "predicted": record.get("predicted_balance"),
                "achieved": round(overall_imbalance(busy), 4),
                "round_robin": round(overall_imbalance(rank_loads(dealt, loads)), 4),
            },
            "bytes": {
                "within": within,
                "across": across,
                "round_robin": {"within": dealt_within, "across": dealt_across},
            },
            "calibration": record.get("calibration"),
        }
    ]


def dealt_out(placement: Placement) -> Placement:
    """Experts dealt out in turn over the same ranks, with as many slots as the placement has on a rank."""
    slots = max(len(held) for ranks in placement.slots for held in ranks)
    return round_robin(placement.layers, placement.num_experts, placement.num_ranks, slots)


def moved(bytes_to: Sequence[Sequence[int]], topology: Topology) -> tuple[int, int]:
    """bytes_to [R][R], from each rank to each -> bytes (within nodes, across nodes)."""
    node_of = np.asarray(topology.node_of)
    sent = np.asarray(bytes_to, dtype=np.int64)
    near = node_of[:, None] == node_of
    return int(sent[near].sum()), int(sent[~near].sum())


def describe_experts(experts: JsonObject | None) -> list[str]:
    """For people, a line or two on the gangs of several ranks together; none where there was none."""
    gangs = [] if experts is None else [gang for gang in experts["gangs"] if np.sum(gang["rows"])]
    if not gangs:
        return []
    work = np.array([np.sum(gang["rows"]) / len(gang["nodes"]) for gang in gangs])

    def mean(name: str) -> float | None:
        found = [gang["balance"][name] for gang in gangs]
        return None if None in found else float(np.average(found, weights=work))

    achieved, predicted, dealt = mean("achieved"), mean("predicted"), mean("round_robin")
    foretold = "" if predicted is None else f"; {predicted:.2f} was foretold"
    within, across = (human_bytes(sum(gang["bytes"][name] for gang in gangs)) for name in ("within", "across"))
    in_turn = [human_bytes(sum(gang["bytes"]["round_robin"][name] for gang in gangs)) for name in ("within", "across")]
    took = [gang["calibration"] for gang in gangs if gang["calibration"] is not None]
    measured = [
        f"         placed by {facts['rows']:,} rows, which took {facts['seconds']:.1f} s, "
        f"{facts['moving_s']:.1f} s of it to read the experts that moved"
        for facts in took[-1:]
    ]
    return [
        f"experts: the busiest rank computed {achieved:.2f} times the mean{foretold}; dealt out in turn: {dealt:.2f}",
        f"         {within} moved within nodes, {across} across; dealt out in turn: {in_turn[0]} and {in_turn[1]}",
        *measured,
    ]
