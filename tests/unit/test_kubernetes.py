"""deploy/kubernetes: valid for Kubernetes, and at one with itself, the flags and the images."""

import asyncio
import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import grpc
import kubernetes_validate
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from colrow import __version__
from colrow.rpc import Server
from coordinator import config as coordinator_config
from coordinator import grpc_server as coordinator_server
from shard_worker import config as worker_config
from shard_worker import grpc_server as worker_server
from tests import kustomize
from tests.kustomize import Manifest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir())
OLDEST = "1.27"  # the first with gRPC probes for good, and with all fields that are used
STOP_GRACE_S = 2  # of the coordinator's servers, after the drain
SCRATCH = {"/tmp", "/dev/shm", "/models"}

PARSERS: dict[str, Any] = {
    "coordinator": coordinator_config.parse,
    "worker": worker_config.parse,
}
SERVICES = {
    "coordinator": coordinator_server.SERVICES,
    "worker": (worker_server.SERVICE,),
}


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return kustomize.render(FOLDER / "overlays" / request.param)


def the(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = [m for m in manifests if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


def workload(manifests: list[Manifest], service: str) -> Manifest:
    kind = {"coordinator": "Deployment", "worker": "StatefulSet"}[service]
    return the(manifests, kind, f"colrow-{service}")


def main_container(manifests: list[Manifest], service: str) -> Manifest:
    spec = kustomize.pod(workload(manifests, service))
    assert spec is not None
    (container,) = spec["containers"]
    assert container["name"] == service
    return container


def flags(manifests: list[Manifest], service: str, capsys: pytest.CaptureFixture[str]) -> Any:
    """The configuration that the container's arguments are to the service itself."""
    command, *arguments = main_container(manifests, service)["args"]
    assert command == service, "the images' entry point is `colrow`"
    arguments = [argument.replace("$(POD_IP)", "10.1.2.3") for argument in arguments]
    try:
        return PARSERS[service](arguments)
    except SystemExit:
        raise AssertionError(capsys.readouterr().err) from None


def labels(manifest: Manifest) -> dict[str, str]:
    return manifest["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_manifests_are_what_kubernetes_takes(manifests: list[Manifest], version: str) -> None:
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_misspelled_or_misplaced_field_would_be_noticed(manifests: list[Manifest]) -> None:
    def misspell(pod: Manifest) -> None:
        pod["terminationGracePeriodSecond"] = pod.pop("terminationGracePeriodSeconds")

    def misplace(pod: Manifest) -> None:
        pod["readinessProbe"] = pod["containers"][0].pop("readinessProbe")

    for wrong in (misspell, misplace):
        manifest = copy.deepcopy(workload(manifests, "worker"))
        pod = kustomize.pod(manifest)
        assert pod is not None
        wrong(pod)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(manifest, OLDEST, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_our_reading_of_kustomizations_is_that_of_kustomize(overlay: str) -> None:
    commands = (("kustomize", "build"), ("kubectl", "kustomize"))
    command = next((command for command in commands if shutil.which(command[0])), None)
    if command is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    folder = FOLDER / "overlays" / overlay
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

    def ordered(manifests: list[Manifest]) -> list[str]:
        return sorted(json.dumps(manifest, sort_keys=True) for manifest in manifests)

    assert ordered(kustomize.render(folder)) == ordered(list(yaml.safe_load_all(done.stdout)))


def test_every_worker_is_named_once_by_rank_where_the_stateful_set_puts_it(
    manifests: list[Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    spec = workload(manifests, "worker")["spec"]
    service = the(manifests, "Service", spec["serviceName"])["spec"]
    assert service["clusterIP"] == "None"
    port = flags(manifests, "worker", capsys).port
    assert flags(manifests, "coordinator", capsys).workers == tuple(
        f"colrow-worker-{rank}.{spec['serviceName']}:{port}" for rank in range(spec["replicas"])
    )


def test_selectors_find_the_pods_that_they_are_for(manifests: list[Manifest]) -> None:
    for service in PARSERS:
        found = workload(manifests, service)
        assert found["spec"]["selector"]["matchLabels"] == labels(found)
        policy = the(manifests, "NetworkPolicy", f"colrow-{service}")
        assert policy["spec"]["podSelector"]["matchLabels"] == labels(found)
    worker, coordinator = (workload(manifests, name) for name in ("worker", "coordinator"))
    budget = the(manifests, "PodDisruptionBudget", "colrow-worker")["spec"]
    assert budget["selector"]["matchLabels"] == labels(worker)
    assert the(manifests, "Service", "colrow-workers")["spec"]["selector"] == labels(worker)
    assert the(manifests, "Service", "colrow")["spec"]["selector"] == labels(coordinator)


def test_ports_are_those_that_the_services_listen_on_wherever_one_stands(
    manifests: list[Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    worker, coordinator = (flags(manifests, name, capsys) for name in ("worker", "coordinator"))
    listening = {
        "worker": {"grpc": worker.port},
        "coordinator": {"grpc": coordinator.grpc_port, "http": coordinator.http_port},
    }
    assert worker.host == coordinator.host == "0.0.0.0"
    assert worker.advertise_host == "10.1.2.3", "the pod's address, not all of them"
    for name, ports in listening.items():
        container = main_container(manifests, name)
        assert {port["name"]: port["containerPort"] for port in container["ports"]} == ports
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["grpc"]["port"] == ports["grpc"]
        service = the(manifests, "Service", {"worker": "colrow-workers"}.get(name, "colrow"))
        for port in service["spec"]["ports"]:
            assert port["port"] == ports[port["targetPort"]]
        policy = the(manifests, "NetworkPolicy", f"colrow-{name}")["spec"]
        allowed = policy["ingress"][0]["ports"]
        assert {port["port"] for port in allowed} == set(ports.values())


def test_only_the_coordinator_and_the_other_workers_get_at_a_worker(
    manifests: list[Manifest],
) -> None:
    worker, coordinator = (
        {"podSelector": {"matchLabels": labels(workload(manifests, name))}}
        for name in ("worker", "coordinator")
    )
    policy = the(manifests, "NetworkPolicy", "colrow-worker")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert [rule["from"] for rule in policy["ingress"]] == [[coordinator], [worker]]
    assert [rule["to"] for rule in policy["egress"]] == [[worker]]


@pytest.mark.parametrize("service", PARSERS)
async def test_probes_ask_for_names_that_the_service_knows_and_only_readiness_for_the_cluster(
    service: str, manifests: list[Manifest]
) -> None:
    server = Server(SERVICES[service])
    port = await server.start("127.0.0.1:0")
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            async def status(probe: str) -> int:
                asked = main_container(manifests, service)[probe]["grpc"].get("service", "")
                request = health_pb2.HealthCheckRequest(service=asked)
                return (await asyncio.wait_for(stub.Check(request), 10)).status

            # Of a process that runs and does not serve, as while a model loads.
            assert await status("startupProbe") == health_pb2.HealthCheckResponse.SERVING
            assert await status("livenessProbe") == health_pb2.HealthCheckResponse.SERVING
            assert await status("readinessProbe") == health_pb2.HealthCheckResponse.NOT_SERVING
    finally:
        await server.stop(0)


def test_kubernetes_waits_longer_than_a_drain_takes(
    manifests: list[Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    spec = kustomize.pod(workload(manifests, "coordinator"))
    assert spec is not None
    drain_s = flags(manifests, "coordinator", capsys).drain_timeout_s
    assert spec["terminationGracePeriodSeconds"] >= drain_s + STOP_GRACE_S + 5


def test_pods_are_restricted_and_write_to_nothing_but_their_volumes(
    manifests: list[Manifest],
) -> None:
    enforced = the(manifests, "Namespace", "colrow")["metadata"]["labels"]
    assert enforced["pod-security.kubernetes.io/enforce"] == "restricted"
    for manifest in manifests:
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "colrow"
        spec = kustomize.pod(manifest)
        if spec is None:
            continue
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in kustomize.containers(manifest):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert "/tmp" in mounts and mounts.keys() <= SCRATCH
            assert {mount["name"] for mount in mounts.values()} <= volumes
            # Who fills a volume writes to it; who serves from it does not.
            assert mounts["/models"].get("readOnly", False) == (container["name"] != "model")


def test_workers_have_shared_memory_of_their_own(manifests: list[Manifest]) -> None:
    spec = kustomize.pod(workload(manifests, "worker"))
    assert spec is not None
    (shm,) = [volume for volume in spec["volumes"] if volume["name"] == "shm"]
    assert shm["emptyDir"]["medium"] == "Memory"


def test_the_gpu_overlay_gives_each_worker_one_gpu_and_the_model_of_the_coordinator() -> None:
    manifests = kustomize.render(FOLDER / "overlays" / "gpu")
    worker = main_container(manifests, "worker")
    assert "--device=cuda" in worker["args"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    (fetched,) = kustomize.containers(the(manifests, "Job", "colrow-model"))
    assert f"--model={fetched['args'][0]}" in main_container(manifests, "coordinator")["args"]


def test_images_and_the_user_are_those_of_the_dockerfile(manifests: list[Manifest]) -> None:
    dockerfile = ROOT / "Dockerfile"
    if not dockerfile.exists():
        pytest.skip("this version has no Dockerfile")
    text = dockerfile.read_text()
    targets = set(re.findall(r"^FROM \S+ AS (\S+)", text, re.MULTILINE))
    (user,) = re.findall(r"--uid (\d+)", text)
    used = {container["image"] for m in manifests for container in kustomize.containers(m)}
    for image in used:
        name, _, tag = image.removeprefix("colrow-").partition(":")
        # Not "latest", which Kubernetes would ask a registry for at every start.
        assert tag == __version__
        assert name.removesuffix("-gpu") in targets, image
    for manifest in manifests:
        if spec := kustomize.pod(manifest):
            assert spec["securityContext"]["runAsUser"] == int(user)
