"""What is fuzzed, what must hold after each case, and what must not have been left at the end."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from client import Colrow
from colrow.errors import DOMAIN
from colrow.v1 import control_service_pb2
from tests.clusters import Service, start, start_coordinator, wait_until_serving
from tests.fuzz.wire import Hints, Rpc, payloads, put_in

BUDGET = float(os.environ.get("COLROW_FUZZ", "1"))
"""How many times as many cases as `make test` runs."""

DEADLINE_S = 20.0  # a call that has not ended then hangs
LEAKED_MIB = 48  # that a process may have grown by: allocators keep some

PROMPT = [5, 17, 200]
NUM_TOKENS = 4

# Streams that go on for as long as somebody listens: one answer is taken of them.
ENDLESS = {"WatchCluster", "Watch"}

# What bad input may be answered with. UNAVAILABLE and ABORTED are for calls that tear a group down.
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}
OWN_REFUSALS = REFUSALS - {grpc.StatusCode.UNIMPLEMENTED}


def examine(strategy: SearchStrategy[Any], num_cases: int, check: Callable[[Any], None]) -> None:
    """Runs `check` on `num_cases` times the budget of cases; the same ones each time at budget 1."""

    @settings(
        max_examples=max(1, round(num_cases * BUDGET)),
        deadline=None,
        database=None,
        derandomize=BUDGET <= 1,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )
    @given(strategy)
    def run(case: Any) -> None:
        check(case)

    run()


@dataclass(frozen=True)
class Call:
    """How a method is called: the requests, when the client gives up, what it says beside them."""

    requests: Sequence[bytes]
    timeout_s: float
    take: int
    """Responses that are read before the client cancels."""
    metadata: Sequence[tuple[str, str | bytes]]

    def at(self, epoch: int, step: int) -> Call:
        """The call with the numbers of this moment."""
        return replace(self, requests=[put_in(r, epoch=epoch, step=step) for r in self.requests])


@st.composite
def calls(draw: DrawFn, rpc: Rpc, hints: Hints, bases: Sequence[bytes] = ()) -> Call:
    one = payloads(rpc.request, hints, bases)
    if rpc.client_streaming:
        requests = draw(st.lists(one, max_size=4))
        if draw(st.integers(0, 3)) == 0:
            requests = [*requests, *requests]  # the same steps again
    else:
        requests = [draw(one)]
    haste = draw(st.integers(0, 15))
    keys = ("traceparent", "tracestate", "authorization", "x-request-id", "user-agent", "te", "a")
    metadata = draw(
        st.lists(
            st.tuples(st.sampled_from(keys), st.text(' !~0aZ-=,"', max_size=60).map(str.strip))
            | st.tuples(st.sampled_from(("x-bin", "grpc-trace-bin")), st.binary(max_size=60)),
            max_size=3,
        )
    )
    return Call(
        requests=requests,
        timeout_s={0: 0.0001, 1: 0.002, 2: 0.02}.get(haste, DEADLINE_S),
        take=1 if rpc.name in ENDLESS else draw(st.sampled_from((0, 1, 2, 1000))),
        metadata=metadata,
    )


@dataclass
class Tally:
    """What was tried and how it ended."""

    codes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    def __str__(self) -> str:
        ends = ", ".join(f"{count} {code}" for code, count in self.codes.most_common())
        return f"{ends}; slowest {self.slowest_s:.2f} s"


def make(
    channel: grpc.Channel, rpc: Rpc, call: Call, tally: Tally, *further: grpc.StatusCode
) -> None:
    """Makes a call and checks how it ended: in time, and with nothing but an answer or a refusal."""
    began = time.monotonic()
    code, error = _end(channel, rpc, call)
    took_s = time.monotonic() - began
    tally.codes[code.name] += 1
    tally.slowest_s = max(tally.slowest_s, took_s)
    assert took_s < DEADLINE_S, f"{rpc.path} hung for {took_s:.1f} s"
    if code is grpc.StatusCode.OK:
        return
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and call.timeout_s < DEADLINE_S:
        return
    details = error.details()
    assert code in (*REFUSALS, *further), f"{rpc.path}: {code.name}: {details}"
    if code in OWN_REFUSALS and rpc.service.startswith("colrow."):
        status = rpc_status.from_call(error)
        assert status is not None, f"{rpc.path}: {code.name} without details: {details}"
        info = error_details_pb2.ErrorInfo()
        assert any(d.Unpack(info) for d in status.details) and info.domain == DOMAIN, details


def _end(channel: grpc.Channel, rpc: Rpc, call: Call) -> tuple[grpc.StatusCode, Any]:
    kind = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[rpc.client_streaming, rpc.server_streaming]
    method: Any = kind(rpc.path)
    asked = iter(call.requests) if rpc.client_streaming else call.requests[0]
    settings: dict[str, Any] = {"timeout": call.timeout_s, "metadata": call.metadata}
    try:
        if not rpc.server_streaming:
            answer = method.future(asked, **settings)
            if call.take == 0:
                answer.cancel()
                return grpc.StatusCode.OK, None
            answer.result()
            return grpc.StatusCode.OK, None
        stream = method(asked, **settings)
        with contextlib.closing(_Cancelled(stream)):
            for _ in zip(range(call.take), stream, strict=False):
                pass
        return grpc.StatusCode.OK, None
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
        return code, error


@dataclass
class _Cancelled:
    stream: Any

    def close(self) -> None:
        self.stream.cancel()


def log_of(service: Service) -> str:
    """What a service has logged, but for its good requests."""
    lines = service.log.read_text(errors="replace").splitlines()  # gRPC quotes what it gets
    return "\n".join(line for line in lines if "telemetry request ended" not in line)[-20_000:]


def files_in_shm() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("colrow-*")}


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    num_fds: int
    num_threads: int
    resident_mib: float

    @classmethod
    def of(cls, service: Service) -> Held:
        process = psutil.Process(service.process.pid)
        with process.oneshot():
            resident = process.memory_info().rss / 2**20
            return cls(process.num_fds(), process.num_threads(), resident)


class Cluster:
    """Two workers and a coordinator that nothing else uses, and what they said when all was well."""

    def __init__(self, folder: Path, expected: Sequence[int], *flags: str) -> None:
        self.folder = folder
        self.expected = list(expected)
        self.flags = flags
        self.workers = [start(f"worker{r}", "shard_worker", "--port", "0") for r in range(2)]
        for worker in self.workers:
            worker.wait_for_port()
        self._shm = files_in_shm()
        self.start()

    def start(self) -> None:
        """A coordinator, which takes the workers."""
        addresses = [worker.address for worker in self.workers]
        name = ("--served-model-name", "tiny")
        self.coordinator = start_coordinator(self.folder, addresses, *name, *self.flags)
        self.client = Colrow(self.coordinator.address)
        wait_until_serving(self.coordinator, self.client)

    @property
    def services(self) -> list[Service]:
        return [self.coordinator, *self.workers]

    def check(self) -> None:
        """Everyone lives, and a good request gets its tokens."""
        for service in self.services:
            assert service.process.poll() is None, f"{service.name} died:\n{log_of(service)}"
        pieces = self.client.generate(
            PROMPT, max_tokens=NUM_TOKENS, temperature=0, timeout_s=DEADLINE_S
        )
        assert [token for piece in pieces for token in piece.token_ids] == self.expected

    def wait_until_serving(self) -> None:
        wait_until_serving(self.coordinator, self.client)

    @contextlib.contextmanager
    def without_leaks(self) -> Iterator[None]:
        """Nothing is left of what goes on inside: block, call, file, thread or memory."""
        before = [Held.of(service) for service in self.services]
        yield
        self.check()
        deadline = time.monotonic() + 15
        while True:
            after = [Held.of(service) for service in self.services]
            left = [
                f"{service.name} held {old}, now {new}"
                for service, old, new in zip(self.services, before, after, strict=True)
                if new.num_fds > old.num_fds + 4
                or new.num_threads > old.num_threads + 4
                or new.resident_mib > old.resident_mib + LEAKED_MIB
            ]
            state = self.client.cluster()
            scheduler = state.scheduler
            used = (scheduler.running, scheduler.waiting, scheduler.kv_blocks_used)
            if not left and used == (0, 0, 0) and files_in_shm() <= self._shm:
                break
            assert time.monotonic() < deadline, f"{left}, {used}, {files_in_shm() - self._shm}"
            time.sleep(0.1)
        assert state.state == control_service_pb2.CLUSTER_STATE_SERVING
        for service in self.services:
            assert "Traceback" not in log_of(service), log_of(service)

    def stop(self) -> None:
        self.client.close()
        for service in self.services:
            assert service.stop() == 0, log_of(service)
            service.log.unlink()
