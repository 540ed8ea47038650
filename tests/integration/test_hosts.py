"""Clusters over several hosts, whose network fails: cut, silent, slow, split between the workers."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client import Colrow
from colrow.v1 import control_service_pb2, shard_worker_service_pb2
from tests import checkpoints
from tests.clusters import Service, wait_until_serving
from tests.hosts import PORTS, Host, missing, network

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

VOCAB_SIZE = 331
MARGIN = 1e-4
NUM_STREAMS = 4
NUM_TOKENS = 100
CUT_AT = 15  # tokens of the first stream

DETECTION_S = 2.5  # a heartbeat's timeout and the pause between two
PEER_TIMEOUT_S = 4.0  # given to the workers here; 10 s by default
SLACK_S = 1.5  # of cores that others use too
HEALED_S = 8.0  # what recovery may take once the network is whole

SERVING = control_service_pb2.CLUSTER_STATE_SERVING
RECOVERING = control_service_pb2.CLUSTER_STATE_RECOVERING
GLOO = shard_worker_service_pb2.TRANSPORT_GLOO

Asked = tuple[list[int], list[int]]
"""A prompt, and what one host answers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build("smollm2", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def asked(folder: Path) -> list[Asked]:
    """Prompts whose tokens don't hang on the last bit of a sum, which another batch may change."""
    model = checkpoints.oracle(folder)
    chosen: list[Asked] = []
    generator = torch.Generator().manual_seed(0)
    while len(chosen) < NUM_STREAMS:
        prompt = torch.randint(VOCAB_SIZE, (7,), generator=generator).tolist()
        tokens = checkpoints.greedy(model, prompt, NUM_TOKENS)
        with torch.inference_mode():
            logprobs = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
        best, second = logprobs[len(prompt) - 1 : -1].topk(2).values.T
        if (best - second).min() > MARGIN:
            chosen.append((prompt, tokens))
    return chosen


@dataclass
class Cluster:
    """A coordinator and its workers, each on a host of its own, and the host "here" of the client."""

    coordinator: Service
    workers: list[Service]
    coordinator_host: Host
    worker_hosts: list[Host]
    here: Host
    client: Colrow

    def worker_name(self, rank: int) -> str:
        """As logs and status name it."""
        return f"worker {rank} ({self.worker_hosts[rank].name}:{self.workers[rank].port})"

    @property
    def log(self) -> str:
        return self.coordinator.log.read_text()

    def ask(self, asked: Asked, at: Callable[[], None] | None = None) -> list[int]:
        """The tokens that come; `at` is called when CUT_AT of them have."""
        tokens: list[int] = []
        for piece in self.client.generate(asked[0], max_tokens=NUM_TOKENS, temperature=0):
            tokens += piece.token_ids
            if at is not None and len(tokens) >= CUT_AT:
                at()
                at = None
        return tokens


def start_worker(host: Host, port: int, *flags: str) -> Service:
    listen = ("--host", host.address, "--port", str(port), "--advertise-host", host.name)
    return host.start(host.name, "shard_worker", *listen, *flags)


@contextlib.contextmanager
def running(folder: Path, *worker_flags: str, num_workers: int = 2) -> Iterator[Cluster]:
    """A cluster on hosts of its own; no process of it outlives this, whatever fails."""
    services: list[Service] = []
    workers: list[Service] = []  # which a test may replace
    names = [f"worker{rank}" for rank in range(num_workers)]
    with network("coordinator", *names) as (coordinator_host, *worker_hosts, here):
        try:
            services += [start_worker(host, 0, *worker_flags) for host in worker_hosts]
            for service in services:
                service.wait_for_port()
            addresses = [
                f"{host.name}:{service.port}"
                for host, service in zip(worker_hosts, services, strict=True)
            ]
            coordinator = coordinator_host.start(
                "coordinator",
                "coordinator",
                *("--model", str(folder), "--host", coordinator_host.address),
                *("--workers", ",".join(addresses)),
                *("--grpc-port", "0", "--http-port", "0"),
            )
            workers += services
            services.append(coordinator)
            coordinator.wait_for_port()
            with Colrow(coordinator.address) as client:
                wait_until_serving(coordinator, client)
                yield Cluster(coordinator, workers, coordinator_host, worker_hosts, here, client)
            for service in (coordinator, *workers):
                assert service.stop() == 0, service.log.read_text()
        finally:
            for service in (*services, *(w for w in workers if w not in services)):
                if service.process.poll() is None:
                    service.process.kill()
                    service.process.wait()
                service.log.unlink()


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    """One for the tests that leave it as they found it."""
    with running(folder, "--peer-timeout", str(PEER_TIMEOUT_S), num_workers=3) as cluster:
        yield cluster


def listening(pid: int) -> set[tuple[str, int]]:
    """Where anybody on a process's host listens: addresses of IPv4, and ports."""
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = row.split()
            if state == "0A":
                address, _, port = local.partition(":")
                # Of an IPv6 socket that takes IPv4 too, the last of four numbers is the address.
                number = bytes.fromhex(address)[-4:]
                found.add((socket.inet_ntoa(number[::-1]), int(port, 16)))
    return found


def test_workers_of_several_hosts_give_the_tokens_of_one(
    cluster: Cluster, asked: list[Asked]
) -> None:
    with ThreadPoolExecutor(NUM_STREAMS) as threads:
        assert list(threads.map(cluster.ask, asked)) == [tokens for _, tokens in asked]
    workers = [worker.description for worker in cluster.client.cluster().workers]
    assert {worker.transport for worker in workers} == {GLOO}
    assert len({worker.host_id for worker in workers}) == 3
    # Also for activations: at the address that was advertised and no other, on ports that a firewall
    # can be told of.
    for host, worker in zip(cluster.worker_hosts, cluster.workers, strict=True):
        places = listening(worker.process.pid)
        assert len(places) > 1
        assert {address for address, _ in places} == {host.address}
        assert all(port in PORTS for _, port in places)


@dataclass(frozen=True)
class Outage:
    """What came of it. `detected_s` after the cut, `recovered_s` after the network healed."""

    tokens: list[list[int]]
    error: str
    health: int
    detected_s: float
    recovered_s: float


def outlive(
    cluster: Cluster,
    asked: list[Asked],
    cut: Callable[[], None],
    heal: Callable[[], None],
    *,
    lasting_s: float,
) -> Outage:
    """Cuts the network while streams are in flight, and heals it `lasting_s` after the detection."""
    cut_at: list[float] = []

    def cut_now() -> None:
        cut()
        cut_at.append(time.monotonic())

    states = cluster.client.watch()
    assert next(states).state == SERVING
    with ThreadPoolExecutor(NUM_STREAMS) as threads:
        streams = [
            threads.submit(cluster.ask, each, cut_now if each is asked[0] else None)
            for each in asked
        ]
        lost = next(state for state in states if state.state == RECOVERING)
        detected_s = time.monotonic() - cut_at[0]
        seen_health = health(cluster.coordinator.address)
        try:
            time.sleep(lasting_s)
            assert not any(stream.done() for stream in streams), "the cut came too late"
        finally:
            heal()
            healed = time.monotonic()
        back = next(state for state in states if state.state == SERVING)
        recovered_s = time.monotonic() - healed
        assert back.epoch > lost.epoch
        states.close()
        tokens = [stream.result(60) for stream in streams]
    return Outage(tokens, lost.error, seen_health, detected_s, recovered_s)


def report(capsys: pytest.CaptureFixture[str], what: str, outage: Outage) -> None:
    with capsys.disabled():
        print(
            f"\n{what}: detected after {outage.detected_s:.2f} s, serving {outage.recovered_s:.2f} s "
            "after the network healed, 0 calls failed"
        )


def health(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest()
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status


def isolate(*hosts: Host) -> None:
    for host in hosts:
        host.isolate("on")


def rejoin(*hosts: Host) -> None:
    for host in hosts:
        host.isolate("off")


UNREACHABLE = {
    "silent for 1 s": (2, Host.unplug, Host.plug, 1.0),
    # Longer than TCP keeps trying here: connections are made anew.
    "silent for 6 s": (1, Host.unplug, Host.plug, 6.0),
    "link down": (0, lambda host: host.link("down"), lambda host: host.link("up"), 1.0),
}


@pytest.mark.parametrize("how", UNREACHABLE)
def test_a_worker_that_is_cut_off_is_found_and_named_and_streams_go_on_when_it_is_back(
    how: str, cluster: Cluster, asked: list[Asked], capsys: pytest.CaptureFixture[str]
) -> None:
    rank, cut, heal, lasting_s = UNREACHABLE[how]
    outage = outlive(
        cluster,
        asked,
        lambda: cut(cluster.worker_hosts[rank]),
        lambda: heal(cluster.worker_hosts[rank]),
        lasting_s=lasting_s,
    )
    report(capsys, f"worker {rank} cut off ({how})", outage)
    assert outage.tokens == [tokens for _, tokens in asked]
    named = cluster.worker_name(rank)
    assert named in outage.error
    assert f"ended: {named}" in cluster.log
    assert outage.health == health_pb2.HealthCheckResponse.NOT_SERVING
    assert outage.detected_s < DETECTION_S + SLACK_S
    assert outage.recovered_s < HEALED_S


@pytest.mark.parametrize("ranks", [(0, 1), (1, 2)])
def test_two_workers_cut_off_from_each_other_are_found_by_the_peer_timeout_and_named(
    ranks: tuple[int, int],
    cluster: Cluster,
    asked: list[Asked],
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The coordinator reaches both: only their activations are lost.
    hosts = [cluster.worker_hosts[rank] for rank in ranks]
    outage = outlive(cluster, asked, lambda: isolate(*hosts), lambda: rejoin(*hosts), lasting_s=4.0)
    report(capsys, f"workers {ranks[0]} and {ranks[1]} cut off from each other", outage)
    assert outage.tokens == [tokens for _, tokens in asked]
    # "rank 1", or "ranks 1, 2" where a third one waits for both.
    assert re.search(rf"ranks? [\d, ]*({ranks[0]}|{ranks[1]})\b", outage.error), outage.error
    assert outage.health == health_pb2.HealthCheckResponse.NOT_SERVING
    assert outage.detected_s < PEER_TIMEOUT_S + SLACK_S
    # TCP alone would ask for the lost connection again 3 s later.
    assert outage.recovered_s < 2.5


def test_a_coordinator_cut_off_from_its_clients_alone_goes_on_and_they_get_all_of_it_later(
    cluster: Cluster, asked: list[Asked]
) -> None:
    epoch = cluster.client.cluster().epoch
    cut = threading.Event()

    def cut_now() -> None:
        isolate(cluster.coordinator_host, cluster.here)
        cut.set()

    with ThreadPoolExecutor(NUM_STREAMS) as threads:
        streams = [
            threads.submit(cluster.ask, each, cut_now if each is asked[0] else None)
            for each in asked
        ]
        assert cut.wait(20)
        try:
            # Longer than a heartbeat may take, shorter than the 5 s after which a client gives up.
            time.sleep(DETECTION_S)
            assert not any(stream.done() for stream in streams)
        finally:
            rejoin(cluster.coordinator_host, cluster.here)
        assert [stream.result(30) for stream in streams] == [tokens for _, tokens in asked]
    assert cluster.client.cluster().epoch == epoch


def without(*discipline: str) -> str:
    """Why this kernel can't shape traffic so, or nothing."""
    if reason := missing():
        return reason
    with network("any") as (host, _):
        try:
            host.shape(*discipline)
        except (OSError, AssertionError) as error:
            return f"this kernel has no such queueing discipline: {error}"
    return ""


DELAY_S = 0.01
RATE_BITS_PER_S = 2e6
SLOW = {
    "delay": ("netem", "delay", f"{DELAY_S}s"),
    "rate": ("tbf", "rate", f"{RATE_BITS_PER_S:.0f}bit", "burst", "2000", "latency", "400ms"),
}


@pytest.mark.parametrize("how", SLOW)
def test_a_slow_network_costs_time_and_nothing_else(
    how: str, cluster: Cluster, asked: list[Asked], capsys: pytest.CaptureFixture[str]
) -> None:
    if reason := without(*SLOW[how]):
        pytest.skip(reason)

    def communicated() -> tuple[int, int]:
        """Collectives, and bytes that a rank put into them."""
        stats = cluster.client.cluster().workers[0].description.communication
        return sum(each.calls for each in stats), sum(each.payload_bytes for each in stats)

    epoch, before = cluster.client.cluster().epoch, communicated()
    for host in cluster.worker_hosts:
        host.shape(*SLOW[how])
    try:
        began = time.monotonic()
        assert cluster.ask(asked[0]) == asked[0][1]
        took_s = time.monotonic() - began
    finally:
        for host in cluster.worker_hosts:
            host.unshape()
    calls, num_bytes = (after - b for after, b in zip(communicated(), before, strict=True))
    num_peers = len(cluster.workers) - 1
    least_s = {"delay": calls * DELAY_S, "rate": num_bytes * num_peers * 8 / RATE_BITS_PER_S}[how]
    with capsys.disabled():
        print(f"\n{' '.join(SLOW[how])}: {NUM_TOKENS} tokens in {took_s:.2f} s")
    assert took_s > least_s, "it slows nothing down"
    assert cluster.client.cluster().epoch == epoch


def test_a_worker_that_comes_back_at_another_address_is_found_by_its_name(
    cluster: Cluster, asked: list[Asked], capsys: pytest.CaptureFixture[str]
) -> None:
    # As pods do. This test comes after those that need the worker where it was.
    old = cluster.workers[1]

    def heal() -> None:
        moved = cluster.worker_hosts[1].move(cluster.here.address + "1")
        cluster.worker_hosts[1] = moved
        again = start_worker(moved, old.port, "--peer-timeout", str(PEER_TIMEOUT_S))
        cluster.workers[1] = again
        again.wait_for_port()

    outage = outlive(cluster, asked, old.process.kill, heal, lasting_s=0.5)
    report(capsys, "worker 1 killed and started at another address", outage)
    assert outage.tokens == [tokens for _, tokens in asked]
    assert outage.detected_s < DETECTION_S + SLACK_S
    assert outage.recovered_s < HEALED_S


LEASE_S = 2.0


def test_workers_whose_coordinator_is_cut_off_free_the_device_and_load_again_when_it_is_back(
    folder: Path, asked: list[Asked], capsys: pytest.CaptureFixture[str]
) -> None:
    with running(folder, "--lease", str(LEASE_S)) as cluster, ThreadPoolExecutor(1) as threads:
        read = [worker.description.file_bytes_read for worker in cluster.client.cluster().workers]
        cut = threading.Event()

        def cut_now() -> None:
            cluster.coordinator_host.unplug()
            cut.set()

        stream = threads.submit(cluster.ask, asked[0], cut_now)
        assert cut.wait(20)
        began = time.monotonic()
        try:
            for worker in cluster.workers:
                while "freeing the device" not in worker.log.read_text():
                    assert time.monotonic() < began + LEASE_S + 1.0, worker.log.read_text()
                    time.sleep(0.02)
            freed_s = time.monotonic() - began
        finally:
            cluster.coordinator_host.plug()
            healed = time.monotonic()
        assert stream.result(30) == asked[0][1]
        ended_s = time.monotonic() - healed
        after = cluster.client.cluster()
        assert after.epoch > 1
        for now, before in zip(after.workers, read, strict=True):
            assert now.description.file_bytes_read > before + now.description.weight_bytes
    with capsys.disabled():
        print(
            f"\ncoordinator cut off: devices free after {freed_s:.2f} s of a lease of {LEASE_S:g} s; "
            f"the stream ended {ended_s:.2f} s after the network healed"
        )


LEAVE_BEHIND = """
import time
from tests.hosts import network
with network("one", "two") as (one, *_):
    worker = one.start("worker", "shard_worker", "--port", "0")
    print(*(p for p in (one.holder, one.switch, worker.process.pid)), worker.log, flush=True)
    time.sleep(60)
"""


def test_hosts_leave_nothing_behind_also_when_who_made_them_is_killed() -> None:
    def devices() -> set[str]:
        return {name for name in os.listdir("/sys/class/net") if name.startswith("colrow")}

    before = devices()
    with subprocess.Popen(
        [sys.executable, "-c", LEAVE_BEHIND], stdout=subprocess.PIPE, text=True
    ) as maker:
        assert maker.stdout is not None
        *pids, log = maker.stdout.readline().split()
        added = devices() - before
        maker.kill()
    Path(log).unlink()
    assert added
    deadline = time.monotonic() + 10
    while added & devices() or any(map(psutil.pid_exists, map(int, pids))):
        assert time.monotonic() < deadline, (added & devices(), pids)
        time.sleep(0.05)
