"""A node that sees other folders than the rest, as where a mount is missing, is found before a job's work starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[3]
RUN = """
import jobs.cluster.visibility
jobs.cluster.visibility.SHARED_S = 1.0
from jobs.cli import main
main()
"""


@pytest.fixture
def apart(nodes, beside) -> Iterator[object]:
    """A node `m` with mounts of its own: `apart.hide(folder)`, `apart.show(folder)`."""
    namespaces = beside("namespaces")
    if reason := namespaces.why_not("unshare", "nsenter", "mount", "umount"):
        pytest.skip(reason)
    within = ["unshare", "--mount", "--propagation", "private"]
    if subprocess.run([*within, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("mount namespaces can't be made here")
    own_address = nodes.address.rpartition(":")[0]
    node = namespaces.LoneNode(within, gcs_address=nodes.address, own_address=own_address, name="m", num_cpus=1)
    try:
        assert node.id
        yield node
    finally:
        node.end()


def run(settings: dict, folder: Path, address: str) -> tuple[int, str]:
    job = folder / "job.yaml"
    job.write_text(yaml.safe_dump(settings))
    environment = os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, "run", str(job)], env=environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr


def within(node, *words: str) -> None:
    subprocess.run(["nsenter", f"--mount=/proc/{node.pid}/ns/mnt", *words], check=True, capture_output=True)


def test_a_node_without_the_mount_of_the_output_or_the_input_is_named_in_one_line(apart, nodes, moe_job, tmp_path):
    shared = {"input": tmp_path / "in", "output": tmp_path / "o"}
    settings = moe_job("blind", expert_parallel=2, labels={"pool": "in(m, a)"})
    for folder in shared.values():
        folder.mkdir()
    rows = Path(settings["input"]["path"]).rename(shared["input"] / "rows.parquet")
    settings["input"]["path"], settings["output"]["path"] = str(rows), str(shared["output"] / "job")
    for name, said in (("output", "doesn't share output.path: "), ("input", "can't see the input: ")):
        within(apart, "mount", "-t", "tmpfs", "none", str(shared[name]))
        status, stderr = run(settings, tmp_path, nodes.address)
        within(apart, "umount", str(shared[name]))
        assert status == 2
        assert len(stderr.splitlines()) == 1, stderr
        assert said in stderr
        assert str(shared[name]) in stderr
        assert f'cluster.labels: {{ray.io/node-id: "!{apart.id}"}}' in stderr
    assert list((shared["output"] / "job" / "_attempts").iterdir()) == []
    status, stderr = run(settings | {"cluster": settings["cluster"] | {"threads": 3}}, tmp_path, nodes.address)
    assert status == 2
    assert "each shard needs 3 CPUs" in stderr
    assert "set cluster.threads or cluster.expert_parallel lower" in stderr
