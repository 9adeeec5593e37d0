"""A gang whose nodes have networks of their own: what crosses "the network" really crosses one, and it may be cut."""

from __future__ import annotations

import ipaddress
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from jobs.client import DEFAULT_ENGINE

pytestmark = pytest.mark.ray

NAMES = ("x", "y", "z")


@pytest.fixture
def networks(nodes, beside) -> Iterator[tuple[object, dict[str, str]]]:
    """A bridge, and the names of nodes of one CPU in namespaces around it, by id."""
    bridges = beside("namespaces")
    if reason := bridges.why_not("ip"):
        pytest.skip(reason)
    head = nodes.address.rpartition(":")[0]
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
                within[name], gcs_address=nodes.address, own_address=address, name=name, num_cpus=1
            )
            stack.callback(started[name].end)
        yield bridge, {node.id: name for name, node in started.items()}


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
