"""The nodes of the Ray that is connected: what each has, how it is labelled, whether it can be reached from here."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

from jobs.layout import Machine

REACH_S = 1.0  # for a connection to a node's own Ray process to come about
_NUM_THREADS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """`address` and `port` are those of the node's raylet, which every other node speaks to."""

    id: str
    address: str
    port: int
    labels: Mapping[str, str]
    resources: Mapping[str, float]

    def __str__(self) -> str:
        return f"node {self.address} ({self.id[:6]})"

    @property
    def machine(self) -> Machine:
        return Machine(
            num_cpus=int(self.resources.get("CPU", 0)),
            num_gpus=int(self.resources.get("GPU", 0)),
            memory_bytes=int(self.resources.get("memory", 0)),
        )


def living_nodes() -> list[Node]:
    """Those that Ray takes for alive. One whose network was cut may be among them for a while: see `out_of_reach`."""
    import ray

    nodes = cast(list[dict[str, Any]], ray.nodes())  # type: ignore[no-untyped-call]
    return [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            port=int(node["NodeManagerPort"]),
            labels=node.get("Labels") or {},
            resources=node["Resources"],
        )
        for node in nodes
        if node["Alive"]
    ]


def own_node_id() -> str:
    """Of the node that this process is connected to."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def out_of_reach(nodes: Sequence[Node], timeout_s: float = REACH_S) -> list[Node]:
    """Those whose raylet takes no connection: dead or cut off. Ray itself may need a minute to find out."""
    if not nodes:
        return []
    with ThreadPoolExecutor(min(_NUM_THREADS, len(nodes))) as threads:
        reached = list(threads.map(lambda node: _is_reached(node, timeout_s), nodes))
    return [node for node, is_reached in zip(nodes, reached, strict=True) if not is_reached]


def lost_nodes(ids: Collection[str]) -> set[str]:
    """Those of them that are dead by Ray's word, or out of reach."""
    alive = [node for node in living_nodes() if node.id in ids]
    return set(ids) - {node.id for node in alive} | {node.id for node in out_of_reach(alive)}


def _is_reached(node: Node, timeout_s: float) -> bool:
    try:
        with socket.create_connection((node.address, node.port), timeout_s):
            return True
    except OSError:
        return False


def ask_each(nodes: Sequence[Node], question: Callable[[str], Any], timeout_s: float) -> dict[str, Any]:
    """Node id -> `question(node id)` computed there; an Exception where there was none in time, or it was raised.

    Takes no resource of the node's. `question` is best a function within another, which travels whole: one that the
    node has to import fails where it has other code. A node that has died meanwhile is left out.
    """
    import ray
    from ray.exceptions import GetTimeoutError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=0)(question)
    asked = {
        node.id: remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(node.id)
        for node in nodes
    }
    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s)
    answers: dict[str, Any] = {}
    for node_id, reference in asked.items():
        if reference not in ready:
            ray.cancel(reference, force=True)
            answers[node_id] = GetTimeoutError(f"no answer within {timeout_s:.0f} seconds")
            continue
        try:
            answers[node_id] = ray.get(reference)
        except Exception as error:
            answers[node_id] = error
    alive = {node.id for node in living_nodes()}
    return {node_id: answer for node_id, answer in answers.items() if node_id in alive}


def end_stopped(ids: Collection[str], title: str) -> None:
    """Have each of these nodes end its actors of this title that are stopped (SIGSTOP). Nobody waits for it.

    An actor that has not come up yet has no heartbeat that would be missed.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def look_there() -> None:
        import os
        import signal
        import time
        from pathlib import Path

        def stopped() -> set[int]:
            found = set()
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
                    is_meant = (process / "cmdline").read_text().startswith(title)
                except (OSError, ValueError):
                    continue
                if state == "T" and int(parent) == os.getppid() and is_meant:
                    found.add(int(process.name))
            return found

        found = stopped()
        time.sleep(3.0 if found else 0.0)
        for pid in found & stopped():
            os.kill(pid, signal.SIGKILL)

    remote = ray.remote(num_cpus=0, max_retries=0)(look_there)
    for node_id in ids:
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote()
