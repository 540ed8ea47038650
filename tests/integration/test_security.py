"""A whole cluster with mutual TLS on every link, HTTPS and keys: who gets in, and who does not."""

import http.client
import json
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import openai
import psutil
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from client import AsyncColrow, Colrow
from client.certificates import Wanted, make_certificates
from client.endpoint import Endpoint
from colrow import tls
from colrow.errors import ServiceError, Unauthenticated, Unavailable
from colrow.rpc import MAX_METADATA_BYTES, channel
from colrow.v1 import (
    control_service_pb2,
    inference_service_pb2,
    inference_service_pb2_grpc,
    shard_worker_service_pb2,
)
from coordinator.api_keys import add_key
from tests import checkpoints
from tests.certificates import make_cluster
from tests.clusters import Service, start, start_coordinator, wait_until_serving

pytestmark = pytest.mark.timeout(180)

PROMPT = [5, 6, 7]
NUM_TOKENS = 8


@dataclass(frozen=True)
class Secured:
    """A cluster of two workers, its certificates, another cluster's, and a user's key."""

    coordinator: Service
    workers: tuple[Service, ...]
    model: Path
    certs: Path
    foreign: Path
    keys: Path
    key: str
    tokens: list[int]

    @property
    def target(self) -> str:
        return self.coordinator.address

    @property
    def user(self) -> Path:
        return self.certs / "users" / "user"

    def connect(self, **changes: Any) -> Colrow:
        given: dict[str, Any] = {"tls": self.user, "api_key": self.key}
        return Colrow(self.target, **(given | changes))

    def https(self, folder: Path | None = None) -> ssl.SSLContext:
        """A client's context that trusts the cluster's CA and shows the certificate of a folder."""
        context = ssl.create_default_context(cafile=self.certs / "ca" / "ca.crt")
        folder = folder or self.user
        if (folder / "tls.key").exists():
            context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
        return context

    def get(
        self, path: str, context: ssl.SSLContext | None = None, **headers: str
    ) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPSConnection(
            "127.0.0.1",
            self.coordinator.http_port,
            timeout=10,
            context=context or self.https(),
        )
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def check_serves(self) -> None:
        """That a good request gets its answer, by gRPC and by HTTPS, and nobody has died."""
        with self.connect() as colrow:
            assert generated(colrow) == self.tokens
        status, answer = self.get("/v1/models", Authorization=f"Bearer {self.key}")
        assert status == 200 and answer["data"][0]["id"] == self.model.name
        for service in (self.coordinator, *self.workers):
            assert service.process.poll() is None
            assert "Traceback" not in service.log.read_text()


def generated(colrow: Colrow) -> list[int]:
    pieces = colrow.generate(PROMPT, max_tokens=NUM_TOKENS, temperature=0, timeout_s=30)
    return [token for piece in pieces for token in piece.token_ids]


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    model = checkpoints.build("smollm2", folder / "models" / "small")
    certs, foreign = make_cluster(folder / "certs"), make_cluster(folder / "foreign")
    keys = folder / "api-keys"
    key = add_key("alice", keys)
    own = str(certs / "coordinator")
    services: list[Service] = []
    try:
        for rank in range(2):
            services.append(
                start(
                    f"worker{rank}",
                    "shard_worker",
                    *("--port", "0", "--tls", str(certs / "workers" / "localhost")),
                    *("--model-root", str(folder / "models")),
                )
            )
        for worker in services:
            worker.wait_for_port()
        coordinator = start_coordinator(
            model,
            [worker.address for worker in services],
            *("--tls", own, "--client-cert-auth", "--worker-tls", own, "--api-keys", str(keys)),
            *("--log-level", "debug"),
        )
        services.append(coordinator)
        with Colrow(coordinator.address, tls=certs / "users" / "user", api_key=key) as colrow:
            wait_until_serving(coordinator, colrow)
            tokens = generated(colrow)
        assert len(tokens) == NUM_TOKENS
        yield Secured(coordinator, tuple(services[:2]), model, certs, foreign, keys, key, tokens)
    finally:
        codes = [service.stop() for service in reversed(services)]
        logs = "\n".join(service.log.read_text() for service in services)
        for service in services:
            service.log.unlink()
    assert set(codes) == {0}, logs


# --- who gets in ------------------------------------------------------------------------------


def test_the_small_client_gets_its_answers(secured: Secured) -> None:
    with secured.connect() as colrow:
        assert generated(colrow) == secured.tokens
        assert colrow.model().tp_size == 2
        assert len(colrow.cluster().workers) == 2
        assert next(iter(colrow.watch())).epoch == 1
    secured.check_serves()


async def test_so_does_the_asynchronous_one(secured: Secured) -> None:
    async with AsyncColrow(secured.target, tls=secured.user, api_key=secured.key) as colrow:
        pieces = colrow.generate(PROMPT, max_tokens=NUM_TOKENS, temperature=0, timeout_s=30)
        assert [token async for piece in pieces for token in piece.token_ids] == secured.tokens
        assert (await colrow.cluster_as_known()).epoch == 1


def test_plain_stubs_get_theirs_with_nothing_but_grpc(secured: Secured) -> None:
    read = {name: (secured.user / name).read_bytes() for name in ("ca.crt", "tls.key", "tls.crt")}
    credentials = grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(*read.values()),
        grpc.access_token_call_credentials(secured.key),
    )
    with grpc.secure_channel(secured.target, credentials) as made:
        stub = inference_service_pb2_grpc.InferenceServiceStub(made)
        request = inference_service_pb2.GenerateRequest(max_tokens=NUM_TOKENS)
        request.token_ids.ids.extend(PROMPT)
        request.sampling.temperature = 0
        tokens = [
            token for answer in stub.Generate(request, timeout=30) for token in answer.token_ids
        ]
    assert tokens == secured.tokens


def test_the_openai_client_gets_its_answers_over_https(secured: Secured) -> None:
    with openai.OpenAI(
        base_url=f"https://localhost:{secured.coordinator.http_port}/v1",
        api_key=secured.key,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(verify=secured.https()),
    ) as client:
        assert client.models.list().data[0].id == secured.model.name
        answer = client.completions.create(
            model=secured.model.name, prompt=PROMPT, max_tokens=NUM_TOKENS, temperature=0
        )
        assert answer.usage is not None and answer.usage.completion_tokens == NUM_TOKENS
        with pytest.raises(openai.AuthenticationError) as raised:
            client.with_options(api_key="wrong").models.list()
        assert raised.value.code == "invalid_api_key"
    secured.check_serves()


def test_commands_get_in_with_options_or_the_environment(
    secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def colrow(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "client.cli", *arguments, "--target", secured.target],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    given = ("--tls", str(secured.user), "--api-key", secured.key)
    done = colrow("status", "--json", *given)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == "serving"

    refusals = {
        (): "it closes the connection; it may speak TLS (--tls is not given)",
        ("--tls", str(secured.certs / "ca")): "it may ask for a certificate of its CA",
        ("--tls", str(secured.foreign / "users/user")): "its certificate is of no CA in our ca.crt",
        ("--tls", str(secured.user)): "an API key is needed",
        ("--tls", str(secured.user), "--api-key", "wrong"): "the API key is not known here",
        ("--tls", "/nowhere"): "tls = '/nowhere': is no folder with tls.crt",
    }
    for arguments, problem in refusals.items():
        done = colrow("layer", "0", *arguments)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert problem in line

    monkeypatch.setenv("COLROW_TLS", str(secured.user))
    monkeypatch.setenv("COLROW_API_KEY", secured.key)
    for command in (("layer", "0", "mlp"), ("bench", "--batch", "1", "--repeats", "1")):
        more = ("--input-tokens", "4", "--output-tokens", "4") if command[0] == "bench" else ()
        done = colrow(*command, *more)
        assert done.returncode == 0, done.stderr


# --- who does not -----------------------------------------------------------------------------


def refusal(call: Callable[[], object]) -> ServiceError:
    with pytest.raises(ServiceError) as raised:
        call()
    return raised.value


def test_neither_plain_text_nor_another_ca_nor_no_certificate_is_heard(secured: Secured) -> None:
    users = {
        "plain": None,
        "another CA's server": secured.foreign / "users/user",
        "no certificate": secured.certs / "ca",
    }
    # Trusts the server, and shows a certificate of somebody else's CA.
    mixed = secured.keys.parent / "mixed"
    if not mixed.exists():
        mixed.mkdir()
        (mixed / "ca.crt").write_bytes((secured.user / "ca.crt").read_bytes())
        for name in ("tls.crt", "tls.key"):
            (mixed / name).write_bytes((secured.foreign / "users/user" / name).read_bytes())
    users["another CA's user"] = mixed
    for service in (secured.coordinator, *secured.workers):
        for who, folder in users.items():
            with Colrow(service.address, tls=folder, api_key=secured.key) as colrow:
                assert isinstance(refusal(colrow.model), Unavailable), who
            secured.check_serves()


def test_neither_is_it_on_the_port_for_https(secured: Secured) -> None:
    port = secured.coordinator.http_port
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert not plain.recv(100).startswith(b"HTTP")
    with pytest.raises(ssl.SSLError):
        secured.get("/health", ssl.create_default_context())
    without = ssl.create_default_context(cafile=secured.certs / "ca/ca.crt")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        secured.get("/health", without)
    secured.check_serves()


def test_who_begins_a_handshake_and_says_no_more_holds_up_nobody(secured: Secured) -> None:
    ports = (secured.coordinator.port, secured.coordinator.http_port, secured.workers[0].port)
    silent = [socket.create_connection(("127.0.0.1", port)) for port in ports for _ in range(20)]
    try:
        for connection in silent:
            connection.sendall(b"\x16\x03\x01\x02\x00\x01")
        secured.check_serves()
    finally:
        for connection in silent:
            connection.close()


@pytest.mark.parametrize("key", [None, "wrong", "colrow-" + "A" * 43])
def test_without_a_right_key_every_method_is_refused(secured: Secured, key: str | None) -> None:
    services = (
        *inference_service_pb2.DESCRIPTOR.services_by_name.values(),
        *control_service_pb2.DESCRIPTOR.services_by_name.values(),
    )
    paths = [method_path(method) for service in services for method in service.methods]
    paths += ["/grpc.channelz.v1.Channelz/GetServers", "/colrow.v1.Unknown/Method"]
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    with channel(secured.target, tls.read_user(secured.user)) as made:
        for path in paths:
            error = call(made, path, metadata)
            assert error is not None and error.code() is grpc.StatusCode.UNAUTHENTICATED, path
            status = rpc_status.from_call(error)
            assert status is not None
            info = error_details_pb2.ErrorInfo()
            assert status.details[0].Unpack(info)
            assert (info.reason, info.domain) == ("INVALID_API_KEY", "colrow")
        check_probes(made)
    status, answer = secured.get(
        "/v1/models", **dict[str, Any]({"Authorization": f"Bearer {key}"} if key else {})
    )
    assert status == 401
    assert answer["error"]["code"] == "invalid_api_key"
    assert secured.get("/health")[0] == 200
    secured.check_serves()


def method_path(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def call(made: grpc.Channel, path: str, metadata: Any = ()) -> Any:
    """The error with which a call without a message ends; None where it has none."""
    ask: Any = made.stream_stream(path)
    try:
        list(ask(iter([b""]), timeout=10, metadata=metadata))
    except grpc.RpcError as error:
        return error
    return None


def check_probes(made: grpc.Channel) -> None:
    """Health and reflection, which are open."""
    health = health_pb2_grpc.HealthStub(made)
    answer = health.Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(made)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    (listed,) = reflection.ServerReflectionInfo(iter([asked]), timeout=10)
    assert len(listed.list_services_response.service) >= 4


@pytest.mark.parametrize("who", ["users/user", "workers/localhost"])
def test_a_worker_hears_the_coordinator_alone(secured: Secured, who: str) -> None:
    """Others with a certificate of the cluster may ask for its health, as a probe does."""
    service = shard_worker_service_pb2.DESCRIPTOR.services_by_name["ShardWorkerService"]
    paths = [method_path(method) for method in service.methods]
    paths += [
        "/grpc.channelz.v1.Channelz/GetServers",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ]
    for worker in secured.workers:
        with channel(worker.address, tls.read_user(secured.certs / who)) as made:
            for path in paths:
                error = call(made, path)
                assert error is not None and error.code() is grpc.StatusCode.PERMISSION_DENIED
                assert "only 'coordinator' may call this" in error.details()
            health = health_pb2_grpc.HealthStub(made)
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with channel(worker.address, tls.read_user(secured.certs / "coordinator")) as made:
            assert call(made, method_path(service.methods_by_name["Describe"])) is None
    secured.check_serves()


@pytest.mark.parametrize(
    ("shown", "problem"),
    [
        ("foreign", "its certificate is of no CA in our ca.crt, is no server's, or has expired"),
        ("user", "its certificate is of no CA in our ca.crt, is no server's, or has expired"),
        ("other host", "its certificate is not for this name"),
        ("plain", "it does not speak TLS"),
    ],
)
def test_the_coordinator_gives_its_work_to_no_worker_with_a_wrong_identity(
    secured: Secured, tmp_path: Path, shown: str, problem: str
) -> None:
    folder = {"foreign": secured.foreign / "workers/localhost", "user": secured.user}.get(
        shown, secured.certs / "workers/localhost"
    )
    host = "127.0.0.2" if shown == "other host" else "127.0.0.1"
    flags = () if shown == "plain" else ("--tls", str(folder))
    impostor = start("impostor", "shard_worker", "--port", "0", "--host", host, *flags)
    try:
        impostor.wait_for_port()
        coordinator = start_coordinator(
            secured.model,
            [f"{host}:{impostor.port}"],
            *("--worker-tls", str(secured.certs / "coordinator"), "--startup-timeout", "2"),
        )
        line = coordinator.wait_for_failure()
        assert line.startswith("colrow coordinator: worker 0") and line.endswith(problem)
        assert "joined" not in impostor.log.read_text()
    finally:
        assert impostor.stop() == 0
        impostor.log.unlink()


def test_a_worker_loads_from_its_model_roots_only(secured: Secured, tmp_path: Path) -> None:
    outside = checkpoints.build("smollm2", tmp_path / "outside")
    worker = start("worker", "shard_worker", "--port", "0", "--model-root", str(secured.model))
    try:
        worker.wait_for_port()
        link = secured.model.parent / "link"
        link.symlink_to(outside)
        for folder in (outside, link):
            coordinator = start_coordinator(folder, [worker.address])
            line = coordinator.wait_for_failure()
            assert "lies outside of what --model-root allows" in line
        link.unlink()
        coordinator = start_coordinator(secured.model, [worker.address])
        with Colrow(coordinator.address) as colrow:
            wait_until_serving(coordinator, colrow)
            assert len(generated(colrow)) == NUM_TOKENS
        assert coordinator.stop() == 0
        coordinator.log.unlink()
    finally:
        assert worker.stop() == 0
        worker.log.unlink()


# --- keys come and go, and are not told -------------------------------------------------------


def test_a_key_opens_when_it_is_added_and_closes_when_it_is_removed(secured: Secured) -> None:
    before = secured.keys.read_text()
    key = add_key("bob", secured.keys)
    with secured.connect(api_key=key) as colrow:
        assert colrow.model().model == secured.model.name
        secured.keys.write_text(before)
        assert isinstance(refusal(colrow.model), Unauthenticated)
    secured.check_serves()


def test_logs_have_the_names_of_keys_and_no_key(secured: Secured) -> None:
    secured.check_serves()
    with secured.connect(api_key="colrow-wrong-one") as colrow:
        refusal(colrow.model)
    log = secured.coordinator.log.read_text()
    assert "api_key=alice" in log and "call refused" in log
    assert secured.key not in log and "colrow-wrong-one" not in log
    assert secured.key not in repr(Endpoint(secured.target, api_key=secured.key))


# --- limits -----------------------------------------------------------------------------------


def test_metadata_is_bounded(secured: Secured) -> None:
    with secured.connect() as colrow:
        ask = colrow.inference.GetModel
        request = inference_service_pb2.GetModelRequest()
        half = (("x", "y" * (MAX_METADATA_BYTES // 2)),)
        assert ask(request, timeout=10, metadata=half).model == secured.model.name
        with pytest.raises(grpc.RpcError) as raised:
            ask(request, timeout=10, metadata=(("x", "y" * MAX_METADATA_BYTES),))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    secured.check_serves()


def resident(service: Service) -> int:
    return psutil.Process(service.process.pid).memory_info().rss


def test_streams_that_nobody_reads_do_not_pile_up(secured: Secured) -> None:
    """A cluster's state, sent as often as can be asked for to each of forty that don't read."""
    with secured.connect() as colrow:
        size = len(colrow.cluster().SerializeToString())
        request = control_service_pb2.WatchClusterRequest(interval_s=0.05)
        before = resident(secured.coordinator)
        unread = [colrow.control.WatchCluster(request) for _ in range(40)]
        with secured.connect() as reading:
            counted = 0
            for counted, _ in enumerate(reading.watch(interval_s=0.05), 1):
                if counted == 250:
                    break
        grown = resident(secured.coordinator) - before
        for stream in unread:
            stream.cancel()
    assert grown < 40 * 250 * size / 4, f"{grown} bytes for messages of {size}"
    secured.check_serves()


def test_an_answer_that_nobody_reads_is_finished_and_waits_for_its_reader(
    secured: Secured,
) -> None:
    body = {"prompt": PROMPT, "max_tokens": 240, "n": 64, "logprobs": 20, "stream": True}
    # A small window, or the system would hold much of the answer for the reader.
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.settimeout(60)
    narrow.connect(("127.0.0.1", secured.coordinator.http_port))
    connection = http.client.HTTPConnection("127.0.0.1")
    connection.sock = secured.https().wrap_socket(narrow, server_hostname="127.0.0.1")
    headers = {"Authorization": f"Bearer {secured.key}", "Content-Type": "application/json"}
    with secured.connect() as colrow:
        done = colrow.cluster().scheduler.steps + 240
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        deadline = time.monotonic() + 60
        while (state := colrow.cluster().scheduler).running or state.steps < done:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert generated(colrow) == secured.tokens
    content = connection.getresponse().read()
    connection.close()
    assert content.endswith(b"data: [DONE]\n\n")
    # What waited were the tokens of each continuation, together, and not an event for each of them.
    assert 64 < content.count(b"data: ") < 64 * 240 / 2


def test_binding_wider_is_warned_of_loudly_by_both_services(secured: Secured) -> None:
    worker = start("wide", "shard_worker", "--port", "0", "--host", "0.0.0.0")
    coordinator = start(
        "wide",
        "coordinator",
        *("--model", str(secured.model), "--workers", "127.0.0.1:1", "--host", "0.0.0.0"),
        *("--grpc-port", "0", "--http-port", "0"),
    )
    try:
        for service, flags in (
            (worker, ["--tls", "--model-root"]),
            (coordinator, ["--tls", "--api-keys", "--api-keys"]),
        ):
            service.wait_for_port()
            warnings = re.findall(r"^\S+ WARNING .*$", service.log.read_text(), re.M)
            assert len(warnings) == len(flags)
            assert all(flag in line for flag, line in zip(flags, warnings, strict=True))
    finally:
        for service in (worker, coordinator):
            service.stop()
            service.log.unlink()


# --- colrow serve -----------------------------------------------------------------------------


def test_serve_takes_certificates_and_keys_and_says_how_to_call(
    secured: Secured, tmp_path: Path
) -> None:
    (folder,) = make_certificates(tmp_path / "certs", Wanted("localhost"))
    output = tmp_path / "output"
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "client.cli", "serve", str(secured.model), "--tp", "2"),
                *("--grpc-port", "0", "--http-port", "0", "--client-cert-auth"),
                *("--tls", str(folder), "--api-keys", str(secured.keys)),
            ],
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    try:
        deadline = time.monotonic() + 90
        while "Ctrl-C stops it all" not in output.read_text():
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)
        text = output.read_text()
        found = re.search(r"status --target (\S+) --tls (\S+) --api-key KEY", text)
        assert found is not None, text
        assert "--cacert" in text and "https://" in text and "Open:" not in text
        with Colrow(found[1], tls=found[2], api_key=secured.key) as colrow:
            assert generated(colrow) == secured.tokens
            for worker in colrow.cluster().workers:
                with Colrow(worker.address) as plain:
                    assert isinstance(refusal(plain.model), Unavailable)
        with Colrow(found[1], tls=found[2]) as colrow:
            assert isinstance(refusal(colrow.model), Unauthenticated)
    finally:
        process.terminate()
        assert process.wait(30) == 0, output.read_text()
