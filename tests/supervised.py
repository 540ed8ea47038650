"""Clusters whose processes tests may kill and stop: workers are started again, as containers are."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client import Colrow
from colrow.v1 import control_service_pb2
from tests.clusters import Service, start, start_coordinator, wait_until_serving


class Supervisor:
    """Workers on fixed ports, each started again as soon as it ends, as containers are.

    `devices` are theirs by turns.
    """

    def __init__(
        self,
        count: int,
        *arguments: str,
        module: str = "shard_worker",
        devices: Sequence[str] = ("cpu",),
    ) -> None:
        self._module, self._arguments, self._devices = module, arguments, devices
        self.exit_codes: list[int] = []  # of those that were started again
        self.last_words = ""  # of the last of them
        self.workers = [self._start(rank, 0) for rank in range(count)]
        for worker in self.workers:
            worker.wait_for_port()
        self.restarts = True
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _start(self, rank: int, port: int) -> Service:
        device = self._devices[rank % len(self._devices)]
        where = ("--device", device, "--port", str(port))
        return start(f"worker{rank}", self._module, *self._arguments, *where)

    @property
    def addresses(self) -> list[str]:
        return [worker.address for worker in self.workers]

    def _watch(self) -> None:
        while not self._stopping.wait(0.02):
            for rank, worker in enumerate(self.workers):
                if worker.process.poll() is not None and self.restarts:
                    self.exit_codes.append(worker.process.returncode)
                    self.last_words = worker.log.read_text()
                    again = self._start(rank, worker.port)
                    again.port = worker.port
                    worker.log.unlink()
                    self.workers[rank] = again

    def signal(self, rank: int, number: int) -> None:
        self.workers[rank].process.send_signal(number)

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        for worker in self.workers:
            worker.process.send_signal(signal.SIGCONT)
            worker.stop()
            worker.log.unlink()


@dataclass
class Cluster:
    supervisor: Supervisor
    coordinator: Service
    client: Colrow

    @property
    def epoch(self) -> int:
        return self.client.cluster().epoch

    def wait_for_epoch(self, epoch: int, timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            state = self.client.cluster()
            if state.epoch >= epoch and state.state == control_service_pb2.CLUSTER_STATE_SERVING:
                return
            time.sleep(0.02)
        raise AssertionError(f"epoch {epoch} not within {timeout_s} s:\n{self.log}")

    @property
    def log(self) -> str:
        return self.coordinator.log.read_text()


@contextlib.contextmanager
def running(
    folder: Path, tp: int = 2, *flags: str, supervisor: Supervisor | None = None
) -> Iterator[Cluster]:
    """A cluster of its own, whose processes may be killed; the supervisor is stopped in the end."""
    supervisor = supervisor or Supervisor(tp)
    try:
        coordinator = start_coordinator(folder, supervisor.addresses, *flags)
        try:
            with Colrow(coordinator.address) as client:
                wait_until_serving(coordinator, client)
                yield Cluster(supervisor, coordinator, client)
        finally:
            assert coordinator.stop() == 0, coordinator.log.read_text()
            coordinator.log.unlink()
    finally:
        supervisor.stop()


def health(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest()
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status
