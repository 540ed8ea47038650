"""A drain finishes every call that was taken: also what a batch has not started by then."""

import json
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from client import Colrow
from colrow.errors import Unavailable
from colrow.v1 import control_service_pb2
from tests import checkpoints
from tests.clusters import Service, WorkerPool, start_coordinator, wait_until_serving

pytestmark = pytest.mark.timeout(120)

MAX_RUNNING = 2
NUM_PROMPTS = 12
NUM_TOKENS = 40
PROMPTS = [[5, 17, 20 + place] for place in range(NUM_PROMPTS)]
MODEL = "tiny"
DRAINING = control_service_pb2.CLUSTER_STATE_DRAINING


class Draining:
    """A coordinator that runs two sequences at a time, and its client."""

    def __init__(self, service: Service, client: Colrow) -> None:
        self.service = service
        self.client = client

    @property
    def tokens(self) -> int:
        return self.client.cluster().scheduler.generated_tokens

    def post(self, body: dict[str, Any]) -> tuple[int, str]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.service.http_port}/v1/completions",
            json.dumps({"model": MODEL} | body).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build("smollm2", tmp_path_factory.mktemp("model"))


@pytest.fixture
def draining(folder: Path, worker_pool: WorkerPool) -> Iterator[Draining]:
    service = start_coordinator(
        folder,
        worker_pool.addresses(2),
        *("--max-running", str(MAX_RUNNING), "--served-model-name", MODEL),
    )
    try:
        with Colrow(service.address) as client:
            wait_until_serving(service, client)
            yield Draining(service, client)
    finally:
        service.process.kill()
        service.process.wait()
    service.log.unlink()


def http_batch(running: Draining) -> int:
    status, body = running.post(
        {"prompt": PROMPTS, "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}
    )
    assert status == 200, body
    answer = json.loads(body)
    assert [choice["index"] for choice in answer["choices"]] == list(range(NUM_PROMPTS))
    return answer["usage"]["completion_tokens"]


def http_stream_of_a_batch(running: Draining) -> int:
    status, body = running.post(
        {
            "prompt": PROMPTS,
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    assert status == 200, body
    events = [line.removeprefix("data: ") for line in body.splitlines() if line]
    assert events[-1] == "[DONE]", body[-500:]
    return json.loads(events[-2])["usage"]["completion_tokens"]


def http_choices(running: Draining) -> int:
    status, body = running.post(
        {
            "prompt": PROMPTS[0],
            "n": NUM_PROMPTS,
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
            "temperature": 1,
        }
    )
    assert status == 200, body
    answer = json.loads(body)
    assert len(answer["choices"]) == NUM_PROMPTS
    return answer["usage"]["completion_tokens"]


def grpc_choices(running: Draining) -> int:
    pieces = list(
        running.client.generate(
            PROMPTS[0], n=NUM_PROMPTS, max_tokens=NUM_TOKENS, ignore_eos=True, temperature=1
        )
    )
    assert {piece.index for piece in pieces} == set(range(NUM_PROMPTS))
    return sum(len(piece.token_ids) for piece in pieces)


def started(running: Draining, call: Callable[[Draining], int]) -> "Future[int]":
    """A call of which something runs and most has not begun."""
    executor = ThreadPoolExecutor(1)
    future = executor.submit(call, running)
    executor.shutdown(wait=False)
    deadline = time.monotonic() + 30
    while not 0 < running.tokens < NUM_TOKENS * NUM_PROMPTS / 2:
        assert time.monotonic() < deadline
        assert not future.done()
        time.sleep(0.005)
    return future


CALLS = [http_batch, http_stream_of_a_batch, http_choices, grpc_choices]


@pytest.mark.parametrize("call", CALLS)
def test_sigterm_lets_a_call_finish_with_all_of_it_that_had_not_begun(
    call: Callable[[Draining], int], draining: Draining
) -> None:
    answer = started(draining, call)
    draining.service.process.send_signal(signal.SIGTERM)
    while draining.client.cluster().state != DRAINING:
        time.sleep(0.005)
    with pytest.raises(Unavailable) as caught:
        list(draining.client.generate([1], max_tokens=1))
    assert caught.value.reason == "DRAINING"
    assert draining.post({"prompt": [1], "max_tokens": 1})[0] == 503
    assert answer.result(60) == NUM_PROMPTS * NUM_TOKENS
    assert draining.service.process.wait(20) == 0, draining.service.log.read_text()


@pytest.mark.parametrize("call", CALLS)
def test_drain_answers_only_when_all_of_it_is_done(
    call: Callable[[Draining], int], draining: Draining
) -> None:
    answer = started(draining, call)
    drained = threading.Event()

    def drain() -> None:
        draining.client.control.Drain(control_service_pb2.DrainRequest(), timeout=60)
        drained.set()

    thread = threading.Thread(target=drain)
    thread.start()
    while draining.client.cluster().state != DRAINING:
        time.sleep(0.005)
    while not drained.wait(0.005):
        pass
    # Drain's answer and the call's own come over two connections, one right after the other.
    assert answer.result(10) == NUM_PROMPTS * NUM_TOKENS
    assert draining.tokens == NUM_PROMPTS * NUM_TOKENS
    thread.join()
