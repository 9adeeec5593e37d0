"""A real Ray of several nodes, which are raylets on this machine: started once, mended before each test."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from tests.jobs.processes import outliving

OBJECT_STORE_BYTES = 80 << 20
# Ray would need 15 seconds to see that a node is dead.
HEALTH_CHECK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
}


class Nodes:
    """A head without CPUs, and nodes by name: `a` and `b` of one CPU each, labelled `pool: a` and `pool: b`.

    What a test adds or kills is put right by `mend`, before the next test.
    """

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        from jobs.ray_session import _few_processes

        self._sparingly = _few_processes
        with self._sparingly():
            self._cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 0,
                    "include_dashboard": False,
                    "object_store_memory": OBJECT_STORE_BYTES,
                    "_system_config": HEALTH_CHECK,
                },
            )
        self._named: dict[str, Any] = {}
        self.mend()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, name: str, *, num_cpus: int = 1, **options: Any) -> None:
        """Another node, labelled `pool: NAME`. `options` as Ray's own: `resources`, `memory`, `num_gpus`."""
        assert name not in self._named
        with self._sparingly():
            self._named[name] = self._cluster.add_node(
                num_cpus=num_cpus, labels={"pool": name}, object_store_memory=OBJECT_STORE_BYTES, **options
            )

    def id_of(self, name: str) -> str:
        return str(self._named[name].node_id)

    def raylet(self, name: str) -> psutil.Process:
        """Its children are the node's workers."""
        (raylet,) = self._named[name].all_processes["raylet"]
        return psutil.Process(raylet.process.pid)

    def is_idle(self) -> bool:
        """Whether nothing of any job is left: no placement group, and every CPU free."""
        state = self._cluster.global_state
        groups = [group for group in state.placement_group_table().values() if group["state"] != "REMOVED"]
        free = state.available_resources().get("CPU", 0)
        return not groups and free == state.cluster_resources().get("CPU", 0)

    def kill(self, name: str) -> None:
        """SIGKILL everything that runs on the node, as if its power were cut."""
        raylet = self.raylet(name)
        killed = [*raylet.children(recursive=True), raylet]
        for process in killed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        outliving(killed[:-1], 10)
        self._named[name].all_processes["raylet"][0].process.wait(10)

    def remove(self, name: str) -> None:
        self._cluster.remove_node(self._named.pop(name), allow_graceful=False)

    def mend(self) -> None:
        """End the nodes that tests added, and start again those of `a` and `b` that are gone."""
        for name in list(self._named):
            if name not in ("a", "b") or self._named[name].dead_processes():
                self.remove(name)
        for name in ("a", "b"):
            if name not in self._named:
                self.add(name)

    def shut_down(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="session")
def all_nodes(ray_cluster: str) -> Iterator[Nodes]:
    """Beside `ray_cluster`, which sets the environment of the processes and which this process stays connected to."""
    from jobs.ray_session import _environment, _tree_first

    settings = {
        "PYTHONPATH": _tree_first(os.environ.get("PYTHONPATH")),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    with ExitStack() as stack:
        stack.enter_context(_environment(settings))
        nodes = Nodes()
        stack.callback(nodes.shut_down)
        yield nodes


@pytest.fixture(scope="session")
def beside() -> Callable[[str], ModuleType]:
    """A module that lies beside these tests, by its name."""

    def load(name: str) -> ModuleType:
        if name not in sys.modules:
            spec = spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
            assert spec is not None
            assert spec.loader is not None
            sys.modules[name] = module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        return sys.modules[name]

    return load


@pytest.fixture
def nodes(all_nodes: Nodes) -> Nodes:
    all_nodes.mend()
    return all_nodes
