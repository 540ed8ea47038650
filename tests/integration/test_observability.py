"""What a real cluster shows of itself: counts that are exactly what was done."""

import asyncio
import contextlib
import json
import re
import urllib.request
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from client import Colrow
from colrow.v1 import inference_service_pb2, inference_service_pb2_grpc
from coordinator.cluster import Cluster, State
from coordinator.config import parse
from coordinator.metrics import Metrics
from coordinator.model_folder import ModelFolder
from coordinator.request import Request, SamplingRequest
from coordinator.shard_group import ShardGroup
from coordinator.telemetry import Telemetry
from coordinator.worker_client import WorkerClient
from tests.clusters import (
    RunningCluster,
    Service,
    WorkerPool,
    cluster,
    start,
    start_coordinator,
    wait_until_serving,
)
from tests.collector import Collector, attributes

pytestmark = pytest.mark.timeout(120)

MODEL = "observed"
GREEDY = SamplingRequest(temperature=0)
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"

_pb = inference_service_pb2


@dataclass
class Scrape:
    """The samples of one scrape."""

    samples: list[Sample]

    @classmethod
    def parse(cls, body: str) -> "Scrape":
        families = text_string_to_metric_families(body)
        return cls([sample for family in families for sample in family.samples])

    def value(self, name: str, **labels: str) -> float:
        found = [
            sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert len(found) == 1, (name, labels, found)
        return found[0]

    def values(self, name: str, **labels: str) -> dict[str, float]:
        """By the one label that is not given."""
        found = {}
        for sample in self.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                ((_, key),) = sample.labels.items() - labels.items()
                found[key] = sample.value
        return found


@dataclass
class Here:
    """A coordinator within this process, on real workers."""

    cluster: Cluster
    metrics: Metrics

    async def scrape(self) -> Scrape:
        body, _ = await self.metrics.render(self.cluster)
        return Scrape.parse(body.decode())

    async def generate(self, prompt: tuple[int, ...], max_tokens: int, **more: Any) -> int:
        """The number of tokens that came of a request that is not to stop before `max_tokens`."""
        request = Request(
            uuid.uuid4().hex, prompt, GREEDY, max_tokens=max_tokens, ignore_eos=True, **more
        )
        num_tokens = 0
        async with contextlib.aclosing(self.cluster.engine.generate(request)) as outputs:
            async for output in outputs:
                num_tokens += len(output.token_ids)
        return num_tokens


@contextlib.asynccontextmanager
async def here(pool: WorkerPool, model: Path, tp: int, *arguments: str) -> AsyncIterator[Here]:
    addresses = await asyncio.to_thread(pool.addresses, tp)
    config = parse(
        [
            *("--model", str(model), "--served-model-name", MODEL),
            *("--workers", ",".join(addresses)),
            *arguments,
        ]
    )
    group = ShardGroup(
        [WorkerClient(address) for address in config.workers],
        step_timeout_s=config.step_timeout_s,
    )
    folder = ModelFolder.open(config.model)
    metrics = Metrics(MODEL, folder.spec.max_position_embeddings)
    made = Cluster(config, folder, group, observer=Telemetry(metrics))
    running = asyncio.create_task(made.run())
    try:
        async with asyncio.timeout(60):
            while made.state is not State.SERVING:
                assert not running.done(), running.result()
                await asyncio.sleep(0.02)
        yield Here(made, metrics)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await made.stop()


def prompt(length: int, first: int = 100) -> tuple[int, ...]:
    return tuple(range(first, first + length))


async def test_counts_are_exactly_what_was_done(
    worker_pool: WorkerPool, demo_model_folder: Path
) -> None:
    async with here(worker_pool, demo_model_folder, 2, "--block-size", "16") as running:
        plan = running.cluster.plan
        assert plan is not None
        before = await running.scrape()
        assert before.value("vllm:prompt_tokens_total") == 0
        assert before.values("colrow_cluster_state")["serving"] == 1

        # Together, then one whose first three blocks are in the cache by now.
        lengths = {40: 8, 70: 5, 9: 1}
        came = await asyncio.gather(
            *(
                running.generate(prompt(length, 1000 * place), max_tokens)
                for place, (length, max_tokens) in enumerate(lengths.items(), 1)
            )
        )
        assert came == list(lengths.values())
        assert await running.generate(prompt(60, 2000), 4) == 4
        await asyncio.sleep(1.1)  # workers are asked at most once a second
        shown = await running.scrape()

    prompts, completions = sum(lengths) + 60, sum(lengths.values()) + 4
    cached = 48
    # The last token of a request is read, never computed.
    computed = prompts - cached + completions - 4
    assert shown.value("vllm:prompt_tokens_total") == prompts
    assert shown.value("vllm:generation_tokens_total") == completions
    assert shown.value("vllm:prefix_cache_queries_total") == prompts
    assert shown.value("vllm:prefix_cache_hits_total") == cached
    assert shown.value("vllm:num_preemptions_total") == 0
    assert shown.value("vllm:num_requests_running") == 0
    assert shown.value("vllm:num_requests_waiting") == 0
    assert shown.value("vllm:kv_cache_usage_perc") == 0
    assert shown.values("vllm:request_success_total", model_name=MODEL) == {
        "stop": 0,
        "length": 4,
        "abort": 0,
        "error": 0,
    }
    assert shown.value("vllm:iteration_tokens_total_sum") == computed
    assert shown.value("vllm:iteration_tokens_total_count") == shown.value("colrow_steps_total")
    assert shown.value("vllm:time_to_first_token_seconds_count") == 4
    assert shown.value("vllm:inter_token_latency_seconds_count") == completions - 4
    assert shown.value("vllm:request_prompt_tokens_sum") == prompts
    assert shown.value("vllm:request_generation_tokens_sum") == completions
    assert shown.value("vllm:e2e_request_latency_seconds_count") == 4

    assert shown.values("colrow_worker_up") == {"0": 1, "1": 1}
    for shard in plan.ranks:
        rank = str(shard.rank)
        assert shown.value("colrow_worker_weight_bytes", rank=rank) == shard.weight_bytes
        assert shown.value("colrow_worker_busy_seconds_total", rank=rank) > 0
        assert shown.value("colrow_worker_resident_bytes", rank=rank) > shard.weight_bytes
        of_rank = {"rank": rank, "operation": "all_reduce", "path": "shm"}
        num_bytes = shown.values("colrow_communication_bytes_total", **of_rank)
        per_layer = plan.all_reduce_bytes_per_token_per_layer * computed
        layers = {f"model.layers.{index}": per_layer for index in range(plan.spec.num_layers)}
        assert num_bytes == layers | {"model.embed_tokens": per_layer / 2}
        assert sum(num_bytes.values()) == plan.all_reduce_bytes_per_token * computed
        calls = shown.values("colrow_communication_calls_total", **of_rank)
        steps = shown.value("colrow_steps_total")
        assert calls == dict.fromkeys(layers, 2 * steps) | {"model.embed_tokens": steps}


async def test_one_rank_communicates_nothing(
    worker_pool: WorkerPool, demo_model_folder: Path
) -> None:
    async with here(worker_pool, demo_model_folder, 1) as running:
        await running.generate(prompt(5), 2)
        shown = await running.scrape()
    assert shown.value("vllm:generation_tokens_total") == 2
    assert not any(sample.name.startswith("colrow_communication") for sample in shown.samples)


async def test_who_goes_away_is_an_abort_and_continuations_count_one_by_one(
    worker_pool: WorkerPool, demo_model_folder: Path
) -> None:
    async with here(worker_pool, demo_model_folder, 1) as running:
        assert await running.generate(prompt(20), 6, n=3) == 18
        request = Request("leaver", prompt(20), GREEDY, max_tokens=500, ignore_eos=True)
        async with contextlib.aclosing(running.cluster.engine.generate(request)) as outputs:
            await anext(outputs)
        shown = await running.scrape()
    outcomes = shown.values("vllm:request_success_total", model_name=MODEL)
    assert (outcomes["length"], outcomes["abort"]) == (1, 1)
    assert shown.value("vllm:request_params_n_sum") == 4
    assert shown.value("vllm:request_params_max_tokens_sum") == 506
    assert shown.value("vllm:prompt_tokens_total") == 40
    generated = shown.value("vllm:generation_tokens_total")
    assert 19 <= generated < 100
    # Each continuation's first token is the next of none.
    assert shown.value("vllm:inter_token_latency_seconds_count") == generated - 4


# --- a coordinator of its own process ------------------------------------------------------------


def log_lines(service: Service) -> list[dict[str, Any]]:
    """What a service has logged as JSON; it has printed nothing else."""
    return [json.loads(line) for line in service.log.read_text().splitlines()]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as made:
        yield made


@pytest.fixture(scope="module")
def observed(
    worker_pool: WorkerPool, demo_model_folder: Path, collector: Collector
) -> Iterator[RunningCluster]:
    """A cluster that logs JSON and sends traces."""
    flags = ("--log-format", "json", "--otlp-endpoint", collector.endpoint)
    with cluster(worker_pool, demo_model_folder, 2, *flags) as running:
        yield running


def generate(target: str, request_id: str, max_tokens: int, **headers: str) -> Iterator[Any]:
    """The responses to a request with a prompt of 4 tokens."""
    request = _pb.GenerateRequest(
        request_id=request_id,
        token_ids=_pb.TokenIds(ids=prompt(4)),
        max_tokens=max_tokens,
        ignore_eos=True,
    )
    with grpc.insecure_channel(target) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        yield from stub.Generate(request, metadata=tuple(headers.items()), timeout=60)


def test_each_request_is_a_line_of_json_with_its_id(observed: RunningCluster) -> None:
    ids = [f"request {index}" for index in range(3)]
    for request_id in ids:
        list(generate(observed.target, request_id, 3))
    ended = [line for line in log_lines(observed.coordinator) if line["message"] == "request ended"]
    by_id = {line["request_id"]: line for line in ended}
    for request_id in ids:
        line = by_id[request_id]
        assert (line["prompt_tokens"], line["completion_tokens"]) == (4, 3)
        assert line["outcome"] == "length"
        assert 0 <= line["queue_s"] <= line["ttft_s"] <= line["total_s"]
        assert re.fullmatch("[0-9a-f]{32}", line["trace_id"])
    assert len({line["trace_id"] for line in by_id.values()}) == len(by_id)


def test_spans_hang_below_the_callers(observed: RunningCluster, collector: Collector) -> None:
    before = len(collector.spans)
    caller = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "a=b"}
    list(generate(observed.target, "traced", 3, **caller))
    spans = [
        span for span in collector.wait_for(before + 4) if span.trace_id == bytes.fromhex(TRACE_ID)
    ]
    (whole,) = [span for span in spans if span.parent_span_id == bytes.fromhex(PARENT_ID)]
    found = attributes(whole.attributes)
    assert found["gen_ai.request.id"] == "traced"
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (4, 3)
    assert whole.trace_state == "a=b"
    phases = [span.name for span in spans if span.parent_span_id == whole.span_id]
    assert sorted(phases) == ["decode", "prefill", "queue"]
    (line,) = [
        line for line in log_lines(observed.coordinator) if line.get("request_id") == "traced"
    ]
    assert line["trace_id"] == TRACE_ID


def http(url: str, body: dict[str, Any] | None = None, **headers: str) -> tuple[str, str]:
    """The body of an answer and its content type."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode(), answer.headers["Content-Type"]


def test_metrics_are_served_over_http_in_both_formats(observed: RunningCluster) -> None:
    url = f"{observed.http_url}/metrics"
    before = Scrape.parse(http(url)[0])
    list(generate(observed.target, "counted", 3))
    body, content_type = http(url)
    assert content_type.startswith("text/plain")
    after = Scrape.parse(body)
    for name, difference in (
        ("vllm:prompt_tokens_total", 4),
        ("vllm:generation_tokens_total", 3),
        ("vllm:e2e_request_latency_seconds_count", 1),
    ):
        assert after.value(name) - before.value(name) == difference
    body, content_type = http(url, Accept="application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    families = {family.name: family for family in parse_openmetrics(body)}
    (sample,) = families["vllm:generation_tokens"].samples
    assert sample.value == after.value("vllm:generation_tokens_total")


def test_a_callers_trace_comes_over_http_too(
    observed: RunningCluster, collector: Collector
) -> None:
    trace_id = TRACE_ID[::-1]
    body = {"prompt": list(prompt(4)), "max_tokens": 3}
    url = f"{observed.http_url}/v1/completions"
    before = len(collector.spans)
    http(url, body, traceparent=f"00-{trace_id}-{PARENT_ID}-01")
    spans = collector.wait_for(before + 4)
    assert any(
        span.trace_id.hex() == trace_id and span.parent_span_id.hex() == PARENT_ID for span in spans
    )
    assert any(line.get("trace_id") == trace_id for line in log_lines(observed.coordinator))


def test_a_refused_request_is_a_line_too(observed: RunningCluster) -> None:
    with pytest.raises(grpc.RpcError):
        list(generate(observed.target, "too long", 10**6))
    (line,) = [
        line for line in log_lines(observed.coordinator) if line.get("request_id") == "too long"
    ]
    assert (line["message"], line["reason"]) == ("request refused", "INVALID_FIELD")


def test_a_lost_worker_is_logged_and_so_are_the_requests_that_did_not_outlive_it(
    demo_model_folder: Path,
) -> None:
    pool = WorkerPool()
    addresses = pool.addresses(2)
    service = start_coordinator(
        demo_model_folder, addresses, "--log-format", "json", "--recovery-timeout", "1"
    )
    try:
        with Colrow(service.address) as client:
            wait_until_serving(service, client)
        responses = generate(service.address, "unlucky", 1000)
        next(responses)
        pool.services[1].process.kill()
        with pytest.raises(grpc.RpcError):
            list(responses)
        assert service.stop() == 0
        lines = log_lines(service)
        (lost,) = [line for line in lines if line["message"].startswith("epoch 1 ended")]
        assert lost["level"] == "ERROR" and "worker 1" in lost["message"]
        (failed,) = [line for line in lines if line.get("request_id") == "unlucky"]
        assert (failed["level"], failed["message"]) == ("ERROR", "request failed")
        assert (failed["outcome"], failed["reason"]) == ("error", "NOT_RECOVERED")
        assert "worker 1" in failed["error"]
        service.log.unlink()
    finally:
        service.process.kill()
        service.process.wait()
        for worker in pool.services:
            worker.process.kill()
            worker.process.wait()
            worker.log.unlink()


def test_a_worker_logs_json(demo_model_folder: Path) -> None:
    worker = start("worker", "shard_worker", "--port", "0", "--log-format", "json")
    try:
        worker.wait_for_port()
        with cluster(WorkerPool([worker]), demo_model_folder, 1) as running:
            list(generate(running.target, "r", 2))
    finally:
        worker.stop()
    messages = [line["message"] for line in log_lines(worker)]
    assert messages[0].startswith("listening on") and messages[-1] == "stopping"
    worker.log.unlink()
