"""`grpc.health.v1`, `/health` and `/live` tell the truth of all ranks, through a worker's death too."""

import json
import queue
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests import checkpoints
from tests.clusters import start
from tests.supervised import Cluster, running

pytestmark = pytest.mark.timeout(120)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
READINESS = ("", "colrow.v1.InferenceService", "colrow.v1.ControlService")
DETECTION_S = 2.5


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = checkpoints.build("smollm2", tmp_path_factory.mktemp("model"))
    with running(folder) as cluster:
        yield cluster


class Watches:
    """A `Watch` of each name, its news in a queue with when they came."""

    def __init__(self, address: str, names: tuple[str, ...]) -> None:
        self._channel = grpc.insecure_channel(address)
        stub = health_pb2_grpc.HealthStub(self._channel)
        self.news: dict[str, queue.SimpleQueue[tuple[int, float]]] = {}
        self._threads = []
        for name in names:
            self.news[name] = queue.SimpleQueue()
            request = health_pb2.HealthCheckRequest(service=name)
            thread = threading.Thread(
                target=self._follow, args=(stub.Watch(request), self.news[name])
            )
            thread.start()
            self._threads.append(thread)

    @staticmethod
    def _follow(
        watch: Iterator[health_pb2.HealthCheckResponse],
        news: "queue.SimpleQueue[tuple[int, float]]",
    ) -> None:
        try:
            for response in watch:
                news.put((response.status, time.monotonic()))
        except grpc.RpcError:
            pass  # the channel was closed

    def next(self, name: str, timeout_s: float) -> int:
        return self.news[name].get(timeout=timeout_s)[0]

    def close(self) -> None:
        self._channel.close()
        for thread in self._threads:
            thread.join()


def check(address: str, name: str) -> int:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=name)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status


def get(url: str) -> tuple[int, dict[str, object]]:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=("killed", "stopped"))
def test_readiness_falls_with_one_rank_and_comes_back_with_it_while_liveness_stays(
    blow: signal.Signals, cluster: Cluster
) -> None:
    address = cluster.coordinator.address
    url = f"http://127.0.0.1:{cluster.coordinator.http_port}"
    watches = Watches(address, (*READINESS, "liveness"))
    try:
        for name in (*READINESS, "liveness"):
            assert watches.next(name, 5) == SERVING
        assert get(f"{url}/health") == (200, {"status": "serving"})

        cluster.supervisor.restarts = False
        epoch = cluster.epoch
        cluster.supervisor.signal(1, blow)
        for name in READINESS:
            assert watches.next(name, DETECTION_S + 1) == NOT_SERVING
            assert check(address, name) == NOT_SERVING
        status, body = get(f"{url}/health")
        assert (status, "recovering" in str(body)) == (503, True)
        # Restarting a coordinator that waits would end the requests that wait with it.
        assert check(address, "liveness") == SERVING
        assert get(f"{url}/live") == (200, {"status": "recovering"})
        # The other rank can be joined at any time: it is ready, and nobody is to restart it.
        survivor = cluster.supervisor.workers[0].address
        for name in ("", "colrow.v1.ShardWorkerService", "liveness"):
            assert check(survivor, name) == SERVING

        cluster.supervisor.signal(1, signal.SIGCONT)
        cluster.supervisor.restarts = True
        for name in READINESS:
            assert watches.next(name, 30) == SERVING
        cluster.wait_for_epoch(epoch + 1)
        assert get(f"{url}/health") == (200, {"status": "serving"})
        assert watches.news["liveness"].empty(), "liveness never changed"
    finally:
        cluster.supervisor.signal(1, signal.SIGCONT)
        cluster.supervisor.restarts = True
        watches.close()


def test_a_worker_without_a_group_is_alive_and_ready_to_be_joined() -> None:
    worker = start("worker", "shard_worker", "--port", "0")
    try:
        worker.wait_for_port()
        for name in ("", "colrow.v1.ShardWorkerService", "liveness"):
            assert check(worker.address, name) == SERVING
    finally:
        assert worker.stop() == 0
        worker.log.unlink()


def test_a_name_that_is_none_is_not_found(cluster: Cluster) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        check(cluster.coordinator.address, "colrow.v1.NoService")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]
