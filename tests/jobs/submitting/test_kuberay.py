"""The KubeRay manifest and its image: what can be held against Ray and against ourselves without a Kubernetes."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli import execute
from jobs.specfile import load_spec
from jobs.submitting.ray_jobs import STOPPING_S
from jobs.submitting.submission import OUTPUT, travelling_spec

ROOT = Path(__file__).parents[3]
KUBERAY = ROOT / "examples" / "kuberay"
(RAY,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)

# The fields of ray.io/v1 as KubeRay's API reference names them (1.6), as far as a job like this may want them.
RAY_JOB = {
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint", "entrypointNumCpus",
    "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata", "rayClusterSpec", "runtimeEnvYAML",
    "shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate", "suspend",
    "ttlSecondsAfterFinished",
}  # fmt: skip
RAY_CLUSTER = {
    "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
    "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs",
}  # fmt: skip
HEAD_GROUP = {"enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template"}
WORKER_GROUP = {
    "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams",
    "replicas", "resources", "scaleStrategy", "suspend", "template",
}  # fmt: skip


@pytest.fixture
def manifest() -> dict[str, dict[str, Any]]:
    """Kind -> document."""
    documents = yaml.safe_load_all((KUBERAY / "rayjob.yaml").read_text())
    return {document["kind"]: document for document in documents}


@pytest.fixture
def cluster(manifest: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["RayJob"]["spec"]["rayClusterSpec"]
    return found


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_manifest_has_the_fields_of_a_ray_job_and_no_other(
    manifest: dict[str, Any], cluster: dict[str, Any]
) -> None:
    job = manifest["RayJob"]
    assert (job["apiVersion"], set(job)) == ("ray.io/v1", {"apiVersion", "kind", "metadata", "spec"})
    assert set(job["spec"]) <= RAY_JOB
    assert set(cluster) <= RAY_CLUSTER
    assert set(cluster["headGroupSpec"]) <= HEAD_GROUP
    assert cluster["authOptions"] == {"mode": "token"}
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKER_GROUP
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "KubeRay takes text only"


def test_ray_s_own_autoscaler_reads_the_cluster_and_finds_it_valid(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    resource = {"metadata": {"name": "gristmill", "namespace": "default"}, "spec": cluster}
    types = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["workers"]["resources"]["CPU"] == 8
    assert types["workers"]["min_workers"] >= 1


def test_every_pod_has_the_image_the_shared_volume_and_the_head_the_job(
    manifest: dict[str, Any], cluster: dict[str, Any]
) -> None:
    assert cluster["rayVersion"] == RAY
    (claims,) = {tuple(v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if v["name"] == "shared")
                 for pod in pods(cluster)}  # fmt: skip
    assert len(claims) == 1
    for pod in pods(cluster):
        (container,) = pod["containers"]
        assert container["image"] == f"REGISTRY/gristmill:{version('gristmill')}"
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (config,) = [volume["configMap"]["name"] for volume in pods(cluster)[0]["volumes"] if "configMap" in volume]
    assert config == manifest["ConfigMap"]["metadata"]["name"]


def test_the_entrypoint_is_our_command_on_a_job_of_ours(
    manifest: dict[str, Any],
    cluster: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    program, *arguments = shlex.split(manifest["RayJob"]["spec"]["entrypoint"])
    assert (program, arguments[0]) == ("gristmill", "run")
    path = Path(arguments[1])
    mounts = pods(cluster)[0]["containers"][0]["volumeMounts"]
    assert str(path.parent) in [mount["mountPath"] for mount in mounts]

    (tmp_path / path.name).write_text(manifest["ConfigMap"]["data"][path.name])
    spec = load_spec(tmp_path / path.name)
    assert travelling_spec(spec).output == spec.output, "no path in it is relative"
    assert manifest["RayJob"]["spec"]["metadata"] == {OUTPUT: spec.output.path}
    assert all(str(place).startswith("/shared/") for place in (spec.model, spec.input.path, spec.output.path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert execute([arguments[0], str(tmp_path / path.name), *arguments[2:]]) == 2
    assert "no such file or folder" in capfd.readouterr().err, "the command and the job are understood"


def test_a_job_gets_time_to_stop(manifest: dict[str, Any]) -> None:
    environment = yaml.safe_load(manifest["RayJob"]["spec"]["runtimeEnvYAML"])
    assert environment == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOPPING_S)}}


def test_the_image_has_this_ray_and_what_is_in_this_tree() -> None:
    lines = (KUBERAY / "Dockerfile").read_text().splitlines()
    assert f"ARG RAY_IMAGE=rayproject/ray:{RAY}-py311-cpu" in lines
    assert any(
        f'"ray[default]=={RAY}"' in line and "constraints.txt" in line for line in lines if line.startswith("RUN")
    )
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert {"pyproject.toml", "constraints.txt", "pipeline", "workers", "jobs"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert any("install -y -qq gcc" in line for line in lines), "for the CPU kernels"
