"""The containers of docker-compose.yml on a real Docker Engine: `make test-compose`.

with_engine.py provides the engine and the images' base. Times here are for a machine that does other
things beside.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from client import Colrow
from client.grpc_client import Piece
from colrow.errors import Unavailable
from colrow.v1 import control_service_pb2, shard_worker_service_pb2
from tests.compose.with_engine import base_image

pytestmark = pytest.mark.timeout(1000)  # the first test has the images built

ROOT = Path(__file__).parents[2]
BUILD_TIMEOUT_S = 900.0
UP_TIMEOUT_S = 300.0
COMMAND_TIMEOUT_S = 120.0
NOTICED_TIMEOUT_S = 60.0
RECOVERED_TIMEOUT_S = 240.0
POLL_S = 0.1
SERVICES = ("coordinator", "worker0", "worker1")
PROMPT = "The three primary colours are"
NUM_TOKENS = 96
DRAINED_TOKENS = 40  # within --drain-timeout on a busy machine, too


def command(*arguments: str, timeout_s: float = COMMAND_TIMEOUT_S, **environment: str) -> str:
    """Runs a command; its stdout, or a failure with all that it said."""
    done = subprocess.run(
        arguments,
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def exit_code(*arguments: str) -> int:
    return subprocess.run(
        arguments, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_TIMEOUT_S
    ).returncode


def compose_command() -> tuple[str, ...]:
    """Compose as a plugin of `docker`, or the older command of its own."""
    with contextlib.suppress(OSError):
        if exit_code("docker", "compose", "version") == 0:
            return ("docker", "compose")
    return ("docker-compose",)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_for(what: str, happened: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(POLL_S)


@dataclass
class Composed:
    """A project of docker-compose.yml, with names and ports of its own."""

    project: str
    grpc_port: int = field(default_factory=free_port)
    http_port: int = field(default_factory=free_port)

    def __call__(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        files = ["--file", str(ROOT / "docker-compose.yml")]
        if os.environ.get("COLROW_TEST_BUILD_NETWORK") == "host":
            files += ["--file", str(ROOT / "tests/compose/build-network.yml")]
        return command(
            *(*compose_command(), "--project-name", self.project, *files, *arguments),
            timeout_s=timeout_s,
            IMAGES=self.project,
            # Sums of floats depend on what is computed at once; in float32 no token hangs on that.
            DTYPE="float32",
            GRPC_PORT=str(self.grpc_port),
            HTTP_PORT=str(self.http_port),
        )

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def image(self, name: str) -> str:
        return f"{self.project}-{name}"

    def container(self, service: str) -> str:
        """Its id, running or not."""
        return command(
            *("docker", "ps", "--all", "--quiet", "--no-trunc"),
            *("--filter", f"label=com.docker.compose.project={self.project}"),
            *("--filter", f"label=com.docker.compose.service={service}"),
        ).strip()

    def inspect(self, service: str) -> dict[str, Any]:
        inspected: list[dict[str, Any]] = json.loads(
            command("docker", "inspect", self.container(service))
        )
        return inspected[0]

    def health(self, service: str) -> str:
        """As Docker's health check has it: starting, healthy or unhealthy."""
        return str(self.inspect(service)["State"]["Health"]["Status"])

    def wait_until_healthy(self) -> None:
        for service in SERVICES:
            wait_for(
                f"{service} is healthy",
                lambda service=service: self.health(service) == "healthy",  # type: ignore[misc]
                UP_TIMEOUT_S,
            )

    def exec_code(self, service: str, *arguments: str) -> int:
        return exit_code("docker", "exec", self.container(service), *arguments)

    def http_health(self) -> int:
        """The status of /health; 0 where nothing answers."""
        try:
            url = f"http://127.0.0.1:{self.http_port}/health"
            with urllib.request.urlopen(url, timeout=5) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def grpc_health(self) -> bool:
        with Colrow(self.target) as client:
            try:
                return client.healthy(5)
            except Unavailable:
                return False

    def left(self) -> dict[str, str]:
        """What Docker still has of the project."""
        mine = ("--quiet", "--filter", f"label=com.docker.compose.project={self.project}")
        return {
            "containers": command("docker", "ps", "--all", *mine),
            "networks": command("docker", "network", "ls", *mine),
            "volumes": command("docker", "volume", "ls", *mine),
        }


@pytest.fixture(scope="module")
def built() -> Iterator[Composed]:
    """The images, built."""
    compose = Composed(f"colrow-test-{os.getpid()}")
    try:
        compose("build", timeout_s=BUILD_TIMEOUT_S)
        yield compose
    finally:
        compose("down", "--volumes", "--timeout", "10")
        for name in ("coordinator", "model", "worker"):
            exit_code("docker", "image", "rm", "--force", compose.image(name))


@pytest.fixture(scope="module")
def cluster(built: Composed) -> Composed:
    """What `docker compose up` starts, and every service healthy."""
    built("up", "--detach", "--no-build", timeout_s=UP_TIMEOUT_S)
    try:
        built.wait_until_healthy()
    except AssertionError as error:
        raise AssertionError(f"{error}\n{built('logs', '--no-color')}") from None
    return built


class Stream(threading.Thread):
    """Greedy tokens of a fixed prompt from the host, as they come."""

    def __init__(self, target: str, num_tokens: int = NUM_TOKENS) -> None:
        super().__init__(daemon=True)
        self.target = target
        self.num_tokens = num_tokens
        self.pieces: list[Piece] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with Colrow(self.target) as client:
                for piece in client.generate(
                    PROMPT,
                    max_tokens=self.num_tokens,
                    temperature=0,
                    ignore_eos=True,
                    timeout_s=RECOVERED_TIMEOUT_S,
                ):
                    self.pieces.append(piece)
        except Exception as error:
            self.error = error

    @property
    def tokens(self) -> list[int]:
        return [token for piece in list(self.pieces) for token in piece.token_ids]

    def wait_for_tokens(self, count: int) -> None:
        wait_for(f"{count} tokens", lambda: len(self.tokens) >= count, COMMAND_TIMEOUT_S)
        assert len(self.tokens) < self.num_tokens, (
            "the stream ended before anything could happen to it"
        )

    def finish(self) -> list[int]:
        self.join(RECOVERED_TIMEOUT_S)
        assert not self.is_alive()
        assert self.error is None, self.error
        return self.tokens


@pytest.fixture(scope="module")
def undisturbed(cluster: Composed) -> list[int]:
    """The tokens when nothing happens."""
    tokens = Stream(cluster.target).finish()
    assert len(tokens) == NUM_TOKENS
    return tokens


# --- images -----------------------------------------------------------------------------------


def image(name: str) -> dict[str, Any]:
    inspected: list[dict[str, Any]] = json.loads(command("docker", "image", "inspect", name))
    return inspected[0]


def python(name: str, script: str, *options: str) -> str:
    """What a script prints in a container of an image."""
    return command(
        *("docker", "run", "--rm", "--network", "none", *options),
        *("--entrypoint", "python3", name, "-c", script),
    ).strip()


def test_the_coordinators_image_is_small_and_has_no_torch(built: Composed) -> None:
    script = "import importlib.util as u; print(u.find_spec('torch') is not None)"
    assert python(built.image("coordinator"), script) == "False"
    assert python(built.image("worker"), script) == "True"
    base_bytes = image(base_image())["Size"]
    added = image(built.image("coordinator"))["Size"] - base_bytes
    print(f"\nbytes beside the base: coordinator {added:,}", end="")
    print(f", worker {image(built.image('worker'))['Size'] - base_bytes:,}")
    assert added < 300e6


def test_an_image_has_the_versions_that_the_suite_was_run_with(built: Composed) -> None:
    script = (
        "import importlib.metadata as m; "
        "print(*(f'{d.name}=={d.version}' for d in m.distributions()))"
    )
    installed = python(built.image("worker"), script).split()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    versions = {
        name: version.partition("+")[0] for name, version in (i.split("==") for i in installed)
    }
    assert {"torch", "grpcio", "tokenizers", "colrow"} <= set(versions)
    others = {
        name: v for name, v in versions.items() if name not in {"colrow", "pip", "setuptools"}
    }
    normalized = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    assert {
        n: v for n, v in others.items() if normalized.get(n.lower().replace("_", "-")) != v
    } == {}


@pytest.mark.parametrize("name", ["coordinator", "model", "worker"])
def test_an_image_is_not_run_by_root(built: Composed, name: str) -> None:
    assert int(python(built.image(name), "import os; print(os.getuid())")) > 0


def test_a_change_of_code_leaves_the_layers_of_packages(built: Composed, tmp_path: Path) -> None:
    context = tmp_path / "context"
    tracked = command("git", "ls-files").split()
    for name in tracked:
        if (ROOT / name).is_file():
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, context / name)
    with (context / "shard_worker" / "executor.py").open("a") as changed:
        changed.write("\n# A change.\n")
    name = built.image("changed")
    network = os.environ.get("COLROW_TEST_BUILD_NETWORK", "default")
    build = ("docker", "build", "--quiet", "--network", network, "--target", "worker")
    try:
        command(*build, "--tag", name, str(context), timeout_s=BUILD_TIMEOUT_S)
        before = image(built.image("worker"))["RootFS"]["Layers"]
        after = image(name)["RootFS"]["Layers"]
    finally:
        exit_code("docker", "image", "rm", "--force", name)
    same = [a == b for a, b in zip(before, after, strict=True)]
    assert not all(same), "the change is not in the image"
    # What follows are the code and empty folders.
    assert same.index(False) >= len(same) - 2
    assert not any(same[same.index(False) : -1])


# --- the cluster ------------------------------------------------------------------------------


def test_what_runs_has_no_privileges_and_a_root_file_system_that_it_cannot_change(
    cluster: Composed,
) -> None:
    for service in SERVICES:
        host = cluster.inspect(service)["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert host["CapDrop"] == ["ALL"]
        assert "no-new-privileges:true" in host["SecurityOpt"]


def test_ports_are_published_on_the_loopback_interface_only(cluster: Composed) -> None:
    published = cluster.inspect("coordinator")["NetworkSettings"]["Ports"]
    assert {
        (port, binding["HostIp"], binding["HostPort"])
        for port, bindings in published.items()
        for binding in bindings or ()
    } == {
        ("50051/tcp", "127.0.0.1", str(cluster.grpc_port)),
        ("8000/tcp", "127.0.0.1", str(cluster.http_port)),
    }
    for worker in ("worker0", "worker1"):
        assert not any(cluster.inspect(worker)["NetworkSettings"]["Ports"].values())


def test_workers_in_two_containers_exchange_through_shared_memory(cluster: Composed) -> None:
    with Colrow(cluster.target) as client:
        seen = client.cluster()
    assert seen.state == control_service_pb2.CLUSTER_STATE_SERVING
    assert seen.transport == shard_worker_service_pb2.TRANSPORT_SHARED_MEMORY
    assert len({worker.description.host_id for worker in seen.workers}) == 1


def test_the_readmes_commands_answer(cluster: Composed) -> None:
    readme = (ROOT / "README.md").read_text()
    asked = re.search(
        r"docker compose exec coordinator (colrow generate .*)$", readme, re.MULTILINE
    )
    assert asked is not None
    answer = cluster("exec", "-T", "coordinator", "sh", "-c", asked.group(1))
    assert "Tokyo" in answer


def test_the_stubs_answer_a_third_container_and_the_host_alike(cluster: Composed) -> None:
    script = f"""
import grpc
from colrow.v1 import inference_service_pb2 as pb
from colrow.v1 import inference_service_pb2_grpc

with grpc.insecure_channel("coordinator:50051") as channel:
    stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
    request = pb.GenerateRequest(text={PROMPT!r}, max_tokens=16)
    request.sampling.temperature = 0
    request.ignore_eos = True
    tokens = []
    for response in stub.Generate(request, timeout=60):
        tokens += response.token_ids
    print(*tokens)
"""
    network = f"{cluster.project}_default"
    run = ("docker", "run", "--rm", "--network", network, "--entrypoint", "python3")
    third = command(*run, cluster.image("coordinator"), "-c", script).split()
    with Colrow(cluster.target) as client:
        host = [
            token
            for piece in client.generate(PROMPT, max_tokens=16, temperature=0, ignore_eos=True)
            for token in piece.token_ids
        ]
    assert len(host) == 16
    assert [int(token) for token in third] == host


def test_a_worker_that_is_killed_in_mid_stream_comes_back_and_the_stream_goes_on(
    cluster: Composed, undisturbed: list[int]
) -> None:
    before = cluster.inspect("worker1")
    with Colrow(cluster.target) as client:
        epoch = client.cluster().epoch
    stream = Stream(cluster.target)
    stream.wait_for_tokens(5)
    # From within, where it is a crash: Docker does not restart what `docker kill` has ended.
    cluster.exec_code("worker1", "sh", "-c", "kill -9 -1")
    killed_at = time.monotonic()
    wait_for("HTTP says so", lambda: cluster.http_health() == 503, NOTICED_TIMEOUT_S)
    assert not cluster.grpc_health()
    assert cluster.exec_code("coordinator", "colrow", "health", "--live") == 0
    assert stream.finish() == undisturbed
    print(f"\nfrom the kill to the end of the stream {time.monotonic() - killed_at:.1f} s")
    after = cluster.inspect("worker1")
    assert after["Id"] == before["Id"]
    assert after["RestartCount"] == before["RestartCount"] + 1
    assert cluster.http_health() == 200
    assert cluster.grpc_health()
    with Colrow(cluster.target) as client:
        seen = client.cluster()
    assert seen.epoch > epoch
    assert seen.transport == shard_worker_service_pb2.TRANSPORT_SHARED_MEMORY
    # The survivor kept its weights.
    headers = 1_000_000
    assert seen.workers[0].description.file_bytes_read < seen.plan.ranks[0].weight_bytes + headers


def test_without_a_worker_the_coordinator_is_alive_but_not_ready(
    cluster: Composed, undisturbed: list[int]
) -> None:
    cluster("stop", "worker0")
    wait_for("gRPC says so", lambda: not cluster.grpc_health(), NOTICED_TIMEOUT_S)
    wait_for(
        "Docker says so", lambda: cluster.health("coordinator") == "unhealthy", NOTICED_TIMEOUT_S
    )
    assert cluster.exec_code("coordinator", "colrow", "health") == 1
    assert cluster.exec_code("coordinator", "colrow", "health", "--live") == 0
    assert cluster.exec_code("worker1", "colrow", "health", "--target", "localhost:50061") == 0
    stream = Stream(cluster.target)  # it waits for the worker
    cluster("start", "worker0")
    assert stream.finish() == undisturbed
    cluster.wait_until_healthy()


def test_a_coordinator_that_is_stopped_finishes_what_runs_and_refuses_what_is_new(
    cluster: Composed, undisturbed: list[int]
) -> None:
    stream = Stream(cluster.target, DRAINED_TOKENS)
    stream.wait_for_tokens(3)
    # SIGTERM, and after the stop_grace_period of the file SIGKILL.
    stop = threading.Thread(
        target=command, args=("docker", "stop", cluster.container("coordinator"))
    )
    stop.start()
    wait_for("it drains", lambda: not cluster.grpc_health(), NOTICED_TIMEOUT_S)
    assert stream.is_alive()
    with Colrow(cluster.target) as client, pytest.raises(Unavailable):
        list(client.generate(PROMPT, max_tokens=1, timeout_s=30))
    assert stream.finish() == undisturbed[:DRAINED_TOKENS]
    stop.join(COMMAND_TIMEOUT_S)
    state = cluster.inspect("coordinator")["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 0)


def test_down_leaves_nothing_behind(cluster: Composed) -> None:
    assert all(cluster.left().values())
    cluster("down", "--volumes")
    assert cluster.left() == {"containers": "", "networks": "", "volumes": ""}


# --- GPUs: what can be checked without one ----------------------------------------------------


def test_the_compose_file_for_gpus_gives_ranks_what_nccl_and_cuda_ipc_need() -> None:
    file = str(ROOT / "docker-compose.gpu.yml")
    services = yaml.safe_load(command(*compose_command(), "--file", file, "config"))["services"]
    workers = [service for name, service in sorted(services.items()) if name.startswith("worker")]
    assert len(workers) == 2
    for worker in workers:
        assert (worker["ipc"], worker["pid"], worker["network_mode"]) == ("host", "host", "host")
        assert worker["tmpfs"] == ["/tmp:exec"]
        (devices,) = worker["deploy"]["resources"]["reservations"]["devices"]
        assert devices["capabilities"] == ["gpu"]
        assert devices["count"] in ("all", -1)
    assert len({worker["environment"]["NCCL_HOSTID"] for worker in workers}) == 1
    flags = [dict(zip(w["command"][1::2], w["command"][2::2], strict=True)) for w in workers]
    assert [flag["--device"] for flag in flags] == ["cuda:0", "cuda:1"]
    addresses = ",".join(f"localhost:{flag['--port']}" for flag in flags)
    assert f"--workers={addresses}" in services["coordinator"]["command"]
    for worker, flag in zip(workers, flags, strict=True):
        assert worker["healthcheck"]["test"][-1] == f"localhost:{flag['--port']}"
