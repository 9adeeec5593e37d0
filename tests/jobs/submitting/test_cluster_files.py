"""The Ray cluster launcher files are what this Ray accepts, and open nothing to the network that they needn't."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli import execute

ROOT = Path(__file__).parents[3]
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


def test_a_submitted_job_finds_the_command_where_it_is_not_in_the_system_s_path() -> None:
    """Ray runs `gristmill run` on the head with the PATH that it was started with itself."""
    config = prepared("examples/cluster-onprem.yaml")
    (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "PATH=~/gristmill/.venv/bin:$PATH" in start
    assert any("pip install" in command and ".venv/bin" in command for command in config["setup_commands"])


@pytest.mark.parametrize("name", FILES)
def test_what_the_file_tells_a_person_to_type_is_a_command_of_ours(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("JOB.yaml").write_text("model: m\ninput: {path: i}\ngenerate: {}\n")
    (line,) = re.findall(r"gristmill (submit JOB\.yaml .*)", (ROOT / name).read_text())
    assert execute(shlex.split(line.replace(":8265", ":9"))) == 2
    assert "http://127.0.0.1:9: nothing answers there" in capfd.readouterr().err


def test_the_cloud_file_has_a_head_one_gpu_type_and_one_cpu_type() -> None:
    types = prepared("cluster.yaml")["available_node_types"]
    assert set(types) == {"head", "gpu", "cpu"}
    assert types["gpu"]["resources"]["GPU"] >= 1
    assert "GPU" not in types["cpu"]["resources"]
    assert types["gpu"]["min_workers"] >= 1, "a job is spread over the machines that are there when it starts"
