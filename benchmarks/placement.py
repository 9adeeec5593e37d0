"""The expert planner: its time, its balance beside EPLB's and round-robin's, and a simulation of 8 to 1,024 ranks.

The first part plans made-up loads of a model with 61 layers of 256 experts (Pareto distributed, as skewed as loads are
said to be, and less) and compares the heaviest rank with DeepSeek's balancer, written again from its description
(benchmarks/eplb.py). The second sends recorded routing (benchmarks/routing.py) through gangs of 8 ranks a node: planned
from every other passage, measured on the others. Pure computation: no processes, no network.

    python -m benchmarks.placement
    python -m benchmarks.placement --plot docs/placement.svg
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.eplb import eplb
from benchmarks.routing import PASSAGE_TOKENS, record
from benchmarks.svg import Chart, draw
from workers.parallel.loads import ExpertLoads
from workers.parallel.placement import Placement, Topology, round_robin
from workers.parallel.planner import plan
from workers.parallel.prediction import expected_traffic, imbalance, overall_imbalance, rank_loads, routed

LAYERS, EXPERTS, GROUPS = 61, 256, 8
SEEDS = range(5)
CASES = (  # alpha of Pareto, ranks, nodes, slots a rank
    (1.5, 64, 8, 5),
    (1.5, 64, 1, 5),
    (2.5, 64, 8, 5),
    (1.5, 64, 8, 4),
    (1.5, 32, 4, 9),
    (1.5, 144, 18, 2),
)
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
RANKS_A_NODE = 8
SLOTS_AN_EXPERT = 1.25
ROW_BYTES = 2 * 7168  # a hidden state of DeepSeek-V3's width in bfloat16

Choices = list[NDArray[np.int64]]


def table(*columns: str) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def row(*values: object) -> None:
    print("|", " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in values), "|", flush=True)


def compare(alpha: float, ranks: int, nodes: int, slots: int) -> None:
    """One row: heaviest rank over mean, averaged over layers and seeds, and what crosses nodes."""
    topology = Topology.even(ranks, nodes)
    seconds, found, crossing = [], [], []
    dealt = round_robin(range(LAYERS), EXPERTS, ranks, slots)
    for seed in SEEDS:
        loads = np.random.default_rng(seed).pareto(alpha, (LAYERS, EXPERTS)) + 1
        start = time.perf_counter()
        placement = plan(loads, topology, slots)
        seconds.append(time.perf_counter() - start)
        theirs = eplb(loads, num_slots=ranks * slots, num_groups=GROUPS, num_nodes=nodes, num_ranks=ranks)
        busy = [rank_loads(dealt, loads), theirs, rank_loads(placement, loads)]
        found.append([imbalance(b).mean() for b in busy] + [imbalance(busy[2]).max()])
        crossing.append([expected_traffic(p, topology, loads).across / loads.sum() for p in (dealt, placement)])
    shares = (f"{share:.0%}" for share in np.mean(crossing, axis=0))
    row(f"Pareto({alpha})", f"{ranks} in {nodes}", slots, *map(float, np.mean(found, axis=0)), *shares, min(seconds))


def simulate(choices: Choices, ranks: int) -> dict[str, tuple[float, float, float]]:
    """By way of placing: heaviest rank over mean, rows across nodes a token and layer, and if sent once to a node."""
    passage = np.arange(len(choices[0])) // PASSAGE_TOKENS
    sample, job = ([chosen[passage % 2 == half] for chosen in choices] for half in (0, 1))
    loads = ExpertLoads(layers=range(len(choices)), num_experts=EXPERTS)
    for layer, chosen in enumerate(sample):
        loads.add(layer, chosen)
    topology = Topology.even(ranks, max(1, ranks // RANKS_A_NODE))
    slots = math.ceil(SLOTS_AN_EXPERT * EXPERTS / ranks)
    ways: dict[str, Callable[[], Placement]] = {
        "round-robin": lambda: round_robin(loads.layers, EXPERTS, ranks, slots),
        "loads": lambda: plan(loads.counts, topology, slots),
        "loads and co-activations": lambda: plan(loads.counts, topology, slots, coactivations=loads.coactivations),
    }
    found = {}
    for name, place in ways.items():
        start = time.perf_counter()
        placement = place()
        seconds = time.perf_counter() - start
        traffic, busy = routed(placement, topology, job)
        once = routed(placement, topology, job, once_per="node")[0].across
        rows = sum(map(len, job))
        balance = overall_imbalance(busy)
        predicted = overall_imbalance(rank_loads(placement, loads.counts))
        found[name] = balance, traffic.across / rows, once / rows
        kib = 2 * traffic.across / rows * ROW_BYTES / 1024
        row(ranks, topology.num_nodes, slots, name, predicted, *found[name], f"{kib:.0f}", seconds)
    return found


def plot(results: dict[int, dict[str, tuple[float, float, float]]]) -> str:
    ways = list(next(iter(results.values())))
    titles = ("Heaviest rank over the mean", "Rows across nodes a token and layer", "The same, sent once to a node")
    return draw(
        [
            Chart(
                title=title,
                x_label=f"ranks, {RANKS_A_NODE} a node",
                xs=list(results),
                lines={way: [result[way][i] for result in results.values()] for way in ways},
                bottom=1.0 if i == 0 else 0.0,
            )
            for i, title in enumerate(titles)
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="write a plot of the simulation, as SVG")
    parser.add_argument("--passages", type=int, default=160, help="of 128 tokens that are recorded")
    options = parser.parse_args()
    print(f"Planned: {LAYERS} layers of {EXPERTS} experts, {len(SEEDS)} seeds; heaviest rank over the mean")
    table(
        "loads", "ranks in nodes", "slots", "round-robin", "EPLB", "planner", "its worst layer",
        "round-robin's pairs across nodes", "planner's", "planner, s",
    )  # fmt: skip
    for case in CASES:
        compare(*case)
    biases = {"as fitted": 0.0, "with favourites": 0.5}
    recordings = record(options.passages, biases=list(biases.values()))
    results: dict[int, dict[str, tuple[float, float, float]]] = {}
    for name, choices in zip(biases, recordings, strict=True):
        print(f"\nSimulated: {len(choices)} layers of {EXPERTS} experts, {len(choices[0]):,} tokens, router {name}")
        table(
            "ranks", "nodes", "slots", "placed by", "predicted", "measured", "rows across nodes", "if once a node",
            "KiB across, both ways", "s",
        )  # fmt: skip
        results = {ranks: simulate(choices, ranks) for ranks in RANKS}
    if options.plot is not None:
        options.plot.write_text(plot(results))


if __name__ == "__main__":
    main()
