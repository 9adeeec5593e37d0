"""The Ray cluster launcher files are what this Ray accepts, and open nothing to the network that they needn't."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = ["cluster.yaml", "examples/cluster-onprem.yaml"]


def prepared(name: str) -> dict[str, Any]:
    """The file as `ray up` sees it after Ray filled in its defaults and checked the whole."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / name).read_text()))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name: str) -> None:
    prepared(name)


@pytest.mark.parametrize("name", FILES)
def test_every_node_gets_this_ray_and_no_nightly_build(name: str) -> None:
    config = prepared(name)
    for role in ("head", "worker"):
        commands = config[f"{role}_setup_commands"]
        assert any(f'"ray[default]=={version("ray")}"' in command for command in commands)
        assert not any("wheels/latest" in command or "-U" in command.split() for command in commands)
    for image in [config.get("docker", {}).get("image", ""), *worker_images(config)]:
        assert not image or f":{version('ray')}-" in image


def worker_images(config: dict[str, Any]) -> list[str]:
    types = config["available_node_types"].values()
    return [kind["docker"]["worker_image"] for kind in types if "docker" in kind]


@pytest.mark.parametrize("name", FILES)
def test_the_dashboard_stays_on_loopback_and_nodes_want_a_token(name: str) -> None:
    config = prepared(name)
    starts = [
        command
        for role in ("head", "worker")
        for command in config[f"{role}_start_ray_commands"]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert any(remote.endswith(".ray/auth_token") for remote in config["file_mounts"])


@pytest.mark.parametrize("name", FILES)
def test_what_the_nodes_install_is_in_this_tree(name: str) -> None:
    mounts = prepared(name)["file_mounts"]
    local = [source for source in mounts.values() if not source.startswith("~")]
    assert {"pyproject.toml", "constraints.txt", "pipeline", "workers", "jobs"} <= set(local)
    assert all((ROOT / source).exists() for source in local)


def test_the_cloud_file_has_a_head_one_gpu_type_and_one_cpu_type() -> None:
    types = prepared("cluster.yaml")["available_node_types"]
    assert set(types) == {"head", "gpu", "cpu"}
    assert types["gpu"]["resources"]["GPU"] >= 1
    assert "GPU" not in types["cpu"]["resources"]
