"""A coordinator and its workers as child processes of this one, on this machine.

    with LocalCluster(folder, tp=2) as cluster:
        cluster.start()
        cluster.wait_until_serving(60)
        with Colrow(cluster.target) as colrow: ...

No process is left behind, whatever happens: leaving the `with` stops them, and should this process
be killed, they notice and end by themselves (client/child.py).
"""

import contextlib
import importlib.util
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from client.endpoint import Endpoint
from client.errors import ClusterError
from client.grpc_client import Colrow
from client.watch import Follower, Update
from colrow.errors import ServiceError
from colrow.gpus import VISIBLE_DEVICES, HostGpus, host_gpus
from colrow.v1 import control_service_pb2
from coordinator.api_keys import add_key

Progress = Callable[[str, int, int], None]
"""`progress(description, done, total)`, as in `client.model_source`."""

OnCluster = Callable[[control_service_pb2.Cluster], None]

START_TIMEOUT_S = 120.0  # until a process listens; importing torch from a cold disk takes a while
STOP_TIMEOUT_S = 8.0  # until SIGKILL; each service gives running calls 2 s
SETTLE_TIMEOUT_S = 3.0  # how long a failure is looked into for a process that ended
POLL_S = 0.02
LAST_LINES = 10
MAX_FAILURES = 5  # of one worker within the window; then it is not started again
FAILURE_WINDOW_S = 60.0
HUNG_AFTER_S = 5.0  # that the coordinator has lost a worker whose process is there
WATCH_INTERVAL_S = 1.0
NEWS_HOLD_S = 3.0  # how long what the coordinator said last is taken for true

CHILD = Path(__file__).with_name("child.py")

# Huge pages for what malloc hands out. A decode step streams all weights from memory; with pages of
# 4 KiB, most of all in a virtual machine, a quarter of its time goes into finding them.
_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclass(frozen=True, slots=True)
class Process:
    """A child, the file that takes all it prints, and the file in which it says its port."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path
    port_file: Path
    started_at: float = field(default_factory=time.monotonic)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def last_words(self, max_lines: int = LAST_LINES) -> str:
        """The end of what the process printed."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:  # its folder was removed
            return ""
        return "\n".join(text.rstrip().splitlines()[-max_lines:])

    def port(self) -> int | None:
        """The port that the process listens on; None as long as it does not."""
        try:
            text = self.port_file.read_text()
        except FileNotFoundError:
            return None
        return int(text) if text.endswith("\n") else None  # else half written

    def how_it_ended(self) -> str:
        """In a few words, of a process that has ended."""
        code = self.popen.returncode
        how = f"ended with exit code {code}"
        if code < 0:
            with contextlib.suppress(ValueError):  # a signal that Python has no name for
                how = f"was killed by {signal.Signals(-code).name}"
        return f"{self.name} {how}"

    def obituary(self) -> str:
        """How the process, which has ended, did so, and what it said last."""
        how = self.how_it_ended()
        words = self.last_words()
        reason = words.splitlines()[-1:]
        if reason and reason[0].startswith(("colrow coordinator: ", "colrow worker: ")):
            # The service said itself what is wrong, in one line.
            return f"{how}: {reason[0].partition(': ')[2]}"
        said = f"; its last words:\n{_indent(words)}" if words else "; it said nothing"
        return f"{how}{said}"


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def require_worker_packages() -> None:
    """ClusterError where this installation has no torch, which is an extra."""
    if importlib.util.find_spec("torch") is None:
        raise ClusterError(
            "a shard worker needs torch, which is not installed: pip install 'colrow[worker]'"
        )


def num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def local_gpus() -> HostGpus:
    """The GPUs that workers of this host would see, who get this process's environment."""
    return host_gpus(os.environ.get(VISIBLE_DEVICES))


class LocalCluster:
    """`model` cut over `tp` worker processes, and their coordinator. Nothing runs before `start`.

    Args:
        model: a folder in Hugging Face layout.
        tp: how many workers.
        devices: of each rank, as `colrow worker --device` takes them; by default all "cpu".
        dtype: "auto" is the checkpoint's.
        coordinator_args, worker_args: further flags of `colrow coordinator` and `colrow worker`.
        tls: a folder of `colrow certs` that the coordinator and the workers serve with, and check
            each other by. Its certificate has to hold for `host` and for 127.0.0.1.
        api_keys: a file of keys, one of which users then have to show.
        grpc_port, http_port: of the coordinator; 0 takes a free one, then in `target` and `http_url`.
        log_folder: takes a log file a process. By default a temporary folder, which is removed by
            `stop` unless something failed.
    """

    def __init__(
        self,
        model: Path,
        tp: int,
        *,
        devices: Sequence[str] | None = None,
        dtype: str = "auto",
        coordinator_args: Sequence[str] = (),
        worker_args: Sequence[str] = (),
        grpc_port: int = 0,
        http_port: int = 0,
        host: str = "127.0.0.1",
        log_folder: Path | None = None,
        tls: Path | None = None,
        api_keys: Path | None = None,
    ) -> None:
        if tp < 1:
            raise ValueError(f"tp must be positive, got {tp}")
        self.model = model
        self.tp = tp
        self.devices = tuple(devices or ["cpu"] * tp)
        self.dtype = dtype
        self.host = host
        self.grpc_port = grpc_port
        self.http_port = http_port
        self.log_folder = log_folder
        self.tls = tls
        self.api_keys = api_keys
        self.processes: list[Process] = []
        self._own_key: str | None = None
        self._coordinator_args = tuple(coordinator_args)
        self._worker_args = tuple(worker_args)
        self._worker_ports: list[int] = []
        self._ends: dict[int, list[float]] = {}  # of workers by rank: when they ended
        self._restart_at: dict[int, float | None] = {}
        self._follower: Follower | None = None  # of the coordinator, while workers are supervised
        self._news: Update | None = None
        self._listening: dict[int, float] = {}  # by pid: since when
        self._temporary_folder: Path | None = None
        self._failed = False

    @property
    def target(self) -> str:
        """Where the coordinator listens, host:port."""
        return f"{self._called_host}:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        """Where its HTTP API is."""
        scheme = "http" if self.tls is None else "https"
        return f"{scheme}://{self._called_host}:{self.http_port}"

    @property
    def endpoint(self) -> Endpoint:
        """How this process calls the coordinator."""
        return Endpoint(self.target, self.tls, self._own_key)

    @property
    def _called_host(self) -> str:
        # An address for listening on every interface is none to call.
        return {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(self.host, self.host)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self, on_progress: Progress | None = None) -> None:
        """Starts the processes and returns when all of them listen; the model is not loaded yet.

        Raises ClusterError where torch is missing or a process ends; then, as on Ctrl-C, the others
        are stopped.
        """
        assert not self.processes, "started already"
        require_worker_packages()
        try:
            self._start(on_progress or (lambda description, done, total: None))
        except BaseException:
            self.stop()
            raise

    def _start(self, report: Progress) -> None:
        if self.log_folder is None:
            self.log_folder = self._temporary_folder = Path(tempfile.mkdtemp(prefix="colrow-"))
        self.log_folder.mkdir(parents=True, exist_ok=True)
        # With one thread a core in all; more would fight for the cores while they wait for each other.
        threads = max(1, num_cores() // self.tp)
        self._worker_args = ("--threads", str(threads), *self._worker_args)
        for rank in range(self.tp):
            # Port 0: a port that is chosen here might be taken before the worker binds it.
            self.processes.append(self._spawn_worker(rank, 0))
        workers = list(self.processes)
        ports = self._wait_for_ports(workers, "Starting the shard workers", report)
        self._worker_ports = ports
        secured: list[str] = []
        if self.tls is not None:
            secured += ["--tls", str(self.tls), "--worker-tls", str(self.tls)]
        if self.api_keys is not None:
            # A key of this process alone, for it knows none of the others.
            own_keys = self.log_folder / "own-api-keys"
            own_keys.unlink(missing_ok=True)
            self._own_key = add_key("colrow-serve", own_keys)
            for file in (self.api_keys, own_keys):
                secured += ["--api-keys", str(file)]
        http_port_file = self.log_folder / "coordinator.http-port"
        self.processes.append(
            self._spawn(
                "coordinator",
                "coordinator",
                *("--model", str(self.model), "--host", self.host),
                *("--grpc-port", str(self.grpc_port), "--dtype", self.dtype),
                *("--http-port", str(self.http_port), "--http-port-file", str(http_port_file)),
                *("--workers", ",".join(f"127.0.0.1:{port}" for port in ports)),
                *secured,
                *self._coordinator_args,
            )
        )
        started = self.processes[-1:]
        (self.grpc_port,) = self._wait_for_ports(started, "Starting the coordinator", report)
        self.http_port = int(http_port_file.read_text())

    def _spawn_worker(self, rank: int, port: int) -> Process:
        return self._spawn(
            f"worker {rank}",
            "shard_worker",
            *("--port", str(port), "--device", self.devices[rank], *self._worker_args),
            *(("--tls", str(self.tls)) if self.tls is not None else ()),
            restarts=port != 0,
        )

    def _spawn(self, name: str, module: str, *arguments: str, restarts: bool = False) -> Process:
        assert self.log_folder is not None
        file_name = name.replace(" ", "-")
        log = self.log_folder / f"{file_name}.log"
        port_file = self.log_folder / f"{file_name}.port"
        port_file.unlink(missing_ok=True)  # of an earlier cluster with these logs
        # A worker that is started again goes on where the one before it stopped.
        with log.open("ab" if restarts else "wb") as output:
            popen = subprocess.Popen(
                # -P: without it child.py's folder, `client`, would come first on the import path.
                [
                    *(sys.executable, "-P", str(CHILD), module),
                    *("--port-file", str(port_file), *arguments),
                ],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_ENVIRONMENT | os.environ,
                # Ctrl-C reaches every process of the terminal's group; the order in which the
                # services stop is ours to choose.
                process_group=0,
            )
        return Process(name, popen, log, port_file)

    def _wait_for_ports(
        self, processes: Sequence[Process], description: str, report: Progress
    ) -> list[int]:
        deadline = time.monotonic() + START_TIMEOUT_S
        num_ready = -1
        while True:
            self.check()
            ports = [port for process in processes if (port := process.port()) is not None]
            if len(ports) != num_ready:
                num_ready = len(ports)
                report(description, num_ready, len(processes))
            if num_ready == len(processes):
                return ports
            if time.monotonic() > deadline:
                self._failed = True
                silent = [process.name for process in processes if process.port() is None]
                raise ClusterError(
                    f"{', '.join(silent)} did not listen within {START_TIMEOUT_S:g} s; see "
                    f"{self.log_folder}"
                )
            time.sleep(POLL_S)

    def check(self, seen: str = "") -> None:
        """ClusterError, with its last words, when a process has ended.

        `seen` is what the coordinator said of it, which knows the phase that a worker was in.
        """
        for process in self.processes:  # workers first: without one the coordinator ends as well
            if process.popen.poll() is not None:
                self._failed = True
                said = process.obituary()
                if seen and process.name != "coordinator":
                    said += f"\n    {seen}"
                raise ClusterError(f"{said}\n    its log: {process.log}")

    def supervise(self) -> list[str]:
        """Starts workers again that have ended, where the coordinator looks for them; what was done.

        One that hangs is killed first: the coordinator has lost it, and its process is there. Started
        the first time at once, then after longer and longer pauses. To be called all the time. Raises
        ClusterError, with its last words, when the coordinator has ended or a worker does not stay up.
        """
        done = self._kill_hung_workers()
        now = time.monotonic()
        for rank, process in enumerate(self.processes[: self.tp]):
            if process.popen.poll() is None:
                continue
            ends = self._ends.setdefault(rank, [])
            if self._restart_at.get(rank) is None:
                ends[:] = [*(end for end in ends if now - end < FAILURE_WINDOW_S), now]
                if len(ends) > MAX_FAILURES:
                    self._failed = True
                    raise ClusterError(
                        f"{process.obituary()}\n    for the {len(ends)}th time within "
                        f"{FAILURE_WINDOW_S:g} s; its log: {process.log}"
                    )
                pause_s = 0.0 if len(ends) == 1 else 0.5 * 2 ** (len(ends) - 2)
                self._restart_at[rank] = now + pause_s
                done.append(f"{process.how_it_ended()}; it is started again")
            at = self._restart_at[rank]
            if at is not None and now >= at:
                assert process.popen.stdin is not None
                process.popen.stdin.close()
                self.processes[rank] = self._spawn_worker(rank, self._worker_ports[rank])
                self._restart_at[rank] = None
        for process in self.processes[self.tp :]:
            if process.popen.poll() is not None:
                self.check()
        return done

    def _kill_hung_workers(self) -> list[str]:
        if self._follower is None:
            self._follower = Follower(self.endpoint, WATCH_INTERVAL_S, asks_workers=False)
            self._follower.start()
        with contextlib.suppress(queue.Empty):
            while True:
                self._news = self._follower.updates.get_nowait()
        now = time.monotonic()
        news = self._news
        if news is None or news.cluster is None or now - news.at > NEWS_HOLD_S:
            return []
        done = []
        for worker in news.cluster.workers:
            process = self.processes[worker.rank]
            if worker.phase != control_service_pb2.WORKER_PHASE_LOST:
                continue
            # One that has only just been started again is lost until the coordinator finds it.
            lost_s = min(now - news.at + worker.phase_age_s, self._listens_for_s(process, now))
            if process.popen.poll() is None and lost_s > HUNG_AFTER_S:
                process.popen.kill()
                process.popen.wait()
                done.append(f"{process.name} hangs ({worker.error}) and is killed")
        return done

    def _listens_for_s(self, process: Process, now: float) -> float:
        """How long a process has been there to be called; not yet, while it may still be starting."""
        if process.port() is None:
            return now - process.started_at - START_TIMEOUT_S
        return now - self._listening.setdefault(process.pid, now)

    def wait_until_serving(
        self, timeout_s: float, on_cluster: OnCluster | None = None
    ) -> control_service_pb2.Cluster:
        """Waits for the model to be loaded and returns the cluster that serves it.

        `on_cluster` is called with the cluster whenever it changes, in the caller's thread. Raises
        ClusterError as soon as a process ends, and when it takes longer than `timeout_s` seconds.
        """
        news: queue.SimpleQueue[control_service_pb2.Cluster | ServiceError] = queue.SimpleQueue()

        def follow(colrow: Colrow) -> None:
            try:
                for cluster in colrow.watch():
                    news.put(cluster)
            except ServiceError as error:
                news.put(error)
            except ValueError:
                pass  # the channel was closed first: nobody waits for news any more

        deadline = time.monotonic() + timeout_s
        last = "no answer"
        # A thread, because a call to a coordinator that waits for a dead worker would block.
        with self.endpoint.connect() as colrow:
            threading.Thread(target=follow, args=(colrow,), daemon=True).start()
            while True:
                try:
                    cluster = news.get(timeout=5 * POLL_S)
                except queue.Empty:
                    self.check()  # after the news, which may say what the process was at
                    if time.monotonic() > deadline:
                        self._fail(f"the cluster did not serve within {timeout_s:g} s ({last})")
                    continue
                if isinstance(cluster, ServiceError):
                    self._fail(f"the coordinator does not answer: {cluster}")
                if cluster.state == control_service_pb2.CLUSTER_STATE_FAILED:
                    self._fail(f"the cluster failed: {cluster.error}")
                if on_cluster is not None:
                    on_cluster(cluster)
                if cluster.state == control_service_pb2.CLUSTER_STATE_SERVING:
                    return colrow.cluster()  # with what the workers hold now
                last = control_service_pb2.ClusterState.Name(cluster.state)

    def _fail(self, message: str) -> NoReturn:
        """Raises ClusterError, of the process that ended if one did: that is closer to the cause."""
        self._failed = True
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while time.monotonic() < deadline:
            self.check(message)
            time.sleep(POLL_S)
        raise ClusterError(f"{message}\n    logs: {self.log_folder}")

    def stop(self) -> None:
        """Ends the processes, the coordinator first, and returns when all are gone.

        SIGTERM, and SIGKILL to those that don't heed it in time; at once when interrupted.
        """
        coordinators = [process for process in self.processes if process.name == "coordinator"]
        workers = [process for process in self.processes if process.name != "coordinator"]
        try:
            # The coordinator ends the group on its workers, so they must still be there.
            _terminate(coordinators)
            _terminate(workers)
        finally:
            for process in self.processes:
                process.popen.kill()  # does nothing to those that have ended
                process.popen.wait()
                assert process.popen.stdin is not None
                process.popen.stdin.close()
            self.processes.clear()
            if self._follower is not None:
                self._follower.stop()
                self._follower = None
            if self._temporary_folder is not None and not self._failed:
                shutil.rmtree(self._temporary_folder, ignore_errors=True)
                self._temporary_folder = self.log_folder = None


def _terminate(processes: Iterable[Process]) -> None:
    """A signal, and up to STOP_TIMEOUT_S for all of them to end."""
    processes = list(processes)
    for process in processes:
        # The second one for a coordinator, which would let its requests finish; the first for a
        # process that does not listen to signals yet.
        process.popen.terminate()
        process.popen.send_signal(signal.SIGINT)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.popen.wait(max(0.0, deadline - time.monotonic()))
