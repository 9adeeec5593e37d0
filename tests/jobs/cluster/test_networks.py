"""Nodes that have networks of their own: what crosses "the network" really crosses one, and it may be cut."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from jobs.client import DEFAULT_ENGINE

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[3]
NAMES = ("x", "y", "z")
SERVED = """
import json, sys
from pathlib import Path
from jobs.client import connect
from jobs.index.served import serving

with serving(Path(sys.argv[1]), name="far", engine_factory="cheap_engine:load"), connect("far") as index:
    results = index.search(["text number 3", "text number 30", "text number 50"], k=1)
    print(json.dumps([index.about, [result.hits[0].row for result in results]]))
"""


@pytest.fixture(scope="module")
def networks(all_nodes, beside) -> Iterator[tuple[object, dict[str, str]]]:
    """A bridge, and the names of nodes of one CPU in namespaces around it, by id."""
    bridges = beside("namespaces")
    if reason := bridges.why_not("ip"):
        pytest.skip(reason)
    head = all_nodes.address.rpartition(":")[0]
    if ipaddress.ip_address(head).is_loopback:
        pytest.skip("this machine has no address but the loopback's, which other networks don't reach")
    with ExitStack() as stack:
        try:
            bridge = bridges.Bridge(head)
            stack.callback(bridge.remove)
            within = {name: bridge.add(name) for name in NAMES}
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces can't be made here: {error.stderr.decode().strip()}")
        started = {}
        for name in NAMES:
            address = bridge.address(name)
            started[name] = bridges.LoneNode(
                within[name], gcs_address=all_nodes.address, own_address=address, name=name, num_cpus=1
            )
            stack.callback(started[name].end)
        yield bridge, {node.id: name for name, node in started.items()}


def test_an_index_is_served_and_asked_over_networks_without_ray_between(networks, nodes, indexed_job):
    bridge, _ = networks
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "workers")]),
        "RAY_ADDRESS": nodes.address,
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
    }
    done = subprocess.run(
        [*bridge.within("x"), sys.executable, "-c", SERVED, str(indexed_job)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    about, rows = json.loads(done.stdout)
    assert (about["asked_by"], about["shards_asked_by"], about["shards"]) == ("socket", "socket", 3)
    assert rows == [3, 30, 50]


def test_a_gang_over_networks_gives_the_same_rows_also_when_one_is_cut(
    networks, nodes, moe_job, moe_rows, controller, rows_of
):
    bridge, names = networks
    settings = moe_job("cut", expert_parallel=2, labels={"pool": "in(x, y, z)"})
    out = Path(settings["output"]["path"])
    before = {name: bridge.sent_bytes(name) for name in NAMES}
    running = controller(settings, address=nodes.address, engine_factory=DEFAULT_ENGINE)
    while not list(out.glob("commits/*.json")):
        assert running.process.poll() is None, running.end()
        time.sleep(0.02)
    (first,) = [json.loads(path.read_text()) for path in sorted(out.glob("placements/*.json"))]
    lost = names[first["nodes"][1]]
    bridge.cut(lost)
    status, _, stderr = running.end(150)
    assert status == 0, stderr

    assert rows_of(out) == moe_rows
    run = json.loads((out / "report.json").read_text())["runs"][-1]
    (death,) = run["deaths"]
    assert "has said nothing for" in death["reason"]
    assert death["recovered_after_s"] < 60
    _, second = [json.loads(path.read_text()) for path in sorted(out.glob("placements/*.json"))]
    assert {names[node] for node in second["nodes"]} == set(NAMES) - {lost}
    sent = [bridge.sent_bytes(name) - before[name] for name in NAMES]
    assert 0 < run["engine"]["exchanged_bytes"] < sum(sent)
