"""Real clusters for tests: worker processes that a session shares, and coordinators that use them.

A worker stays up and is joined anew by each coordinator, as it is in production; so a test pays for a
coordinator, which starts fast, and not for torch.
"""

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from client import Colrow
from colrow.errors import Unavailable

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
END_TIMEOUT_S = 30.0

# A line of gRPC's core, whose threads may still write of a broken handshake when a process has said
# its last.
GRPC_CORE_LINE = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ \S+\.cc:\d+\] ")


@dataclass
class Service:
    """A child process whose log goes to a file, and the port that it says it listens on."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    port: int = 0
    http_port: int = 0
    host: str = "127.0.0.1"

    def wait_for_port(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            # Asked before the log is read: a process may say where it listens and end at once.
            ended = self.process.poll() is not None
            if found := re.search(r"listening on \S+:(\d+)", self.log.read_text()):
                self.port = int(found.group(1))
                # It is logged before the other, by those that have one.
                if http := re.search(r"HTTP API at https?://\S+:(\d+)", self.log.read_text()):
                    self.http_port = int(http.group(1))
                return
            if ended:
                break
            time.sleep(0.02)
        raise AssertionError(f"{self.name} did not start:\n{self.log.read_text()}")

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def stop(self) -> int:
        """SIGTERM, and the exit code; a process that hangs is killed and fails the test."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(
                f"{self.name} did not stop:\n{self.log.read_text(errors='replace')}"
            ) from None

    def wait_for_end(self) -> tuple[int, str]:
        """Exit code and log of a process that is expected to end by itself; the file goes."""
        try:
            code = self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"{self.name} still runs:\n{self.log.read_text()}") from None
        log = self.log.read_text()
        self.log.unlink()
        return code, log

    def wait_for_failure(self) -> str:
        """The one line with which a coordinator ends that can't serve: its last, and no traceback."""
        code, log = self.wait_for_end()
        assert code == 1, log
        assert "Traceback" not in log
        line = last_line(log)
        assert line.startswith("colrow coordinator: "), log
        assert log.count("colrow coordinator: ") == 1, log
        return line


def last_line(log: str) -> str:
    """The last line that a process has said itself, as gRPC's core has not."""
    own = [line for line in log.splitlines() if line.strip() and not GRPC_CORE_LINE.match(line)]
    return own[-1] if own else ""


def start(name: str, module: str, *arguments: str) -> Service:
    """Starts `python -m module` without waiting for it."""
    log = Path(tempfile.mkstemp(prefix=f"colrow-{name}-", suffix=".log")[1])
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )
    return Service(name, process, log)


@dataclass
class WorkerPool:
    """Workers that are started when they are first needed.

    `devices` are theirs by turns; `arguments` are further flags of each.
    """

    services: list[Service] = field(default_factory=list)
    devices: Sequence[str] = ("cpu",)
    arguments: Sequence[str] = ()

    def addresses(self, count: int) -> list[str]:
        new = [
            start(
                f"worker{rank}",
                "shard_worker",
                *("--port", "0", "--device", self.devices[rank % len(self.devices)]),
                *self.arguments,
            )
            for rank in range(len(self.services), count)
        ]
        self.services += new
        for service in new:
            service.wait_for_port()
        for service in self.services:
            assert service.process.poll() is None, service.log.read_text()
        return [service.address for service in self.services[:count]]

    def stop(self) -> None:
        for service in self.services:
            if service.process.poll() is None:
                service.process.send_signal(signal.SIGTERM)
        for service in self.services:
            service.stop()
            service.log.unlink()
        self.services.clear()


@dataclass
class RunningCluster:
    """A coordinator that serves, and a client of it."""

    coordinator: Service
    client: Colrow

    @property
    def target(self) -> str:
        return self.coordinator.address

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.coordinator.http_port}"


def start_coordinator(model: Path, workers: Sequence[str], *arguments: str) -> Service:
    """A coordinator on a free port, not yet serving."""
    service = start(
        "coordinator",
        "coordinator",
        *("--model", str(model), "--workers", ",".join(workers)),
        *("--grpc-port", "0", "--http-port", "0"),
        *arguments,
    )
    service.wait_for_port()
    return service


def wait_until_serving(service: Service, client: Colrow) -> None:
    """Fails with the coordinator's log when it ends, or does not serve in time."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            client.wait_until_serving(1.0)
            return
        except Unavailable as error:
            if service.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{error}\n{service.log.read_text()}") from error


@contextlib.contextmanager
def cluster(pool: WorkerPool, model: Path, tp: int, *arguments: str) -> Iterator[RunningCluster]:
    """The model on `tp` workers of the pool, serving; extra arguments go to the coordinator."""
    service = start_coordinator(model, pool.addresses(tp), *arguments)
    try:
        with Colrow(service.address) as client:
            wait_until_serving(service, client)
            yield RunningCluster(service, client)
    finally:
        code = service.stop()
    assert code == 0, f"the coordinator ended with {code}:\n{service.log.read_text()}"
    service.log.unlink()
