"""What a scrape shows: events in the right histogram, and the cluster's own counts as they are."""

import asyncio
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.samples import Sample

from colrow.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from colrow.memory import MemoryLedger, MemoryUse
from coordinator import metrics
from coordinator.block_manager import BlockManager
from coordinator.cluster import Cluster, State
from coordinator.config import parse
from coordinator.engine import Engine
from coordinator.families import model_spec
from coordinator.metrics import Metrics
from coordinator.model_folder import ModelFolder
from coordinator.request import ModelLimits, Request, RequestRecord
from coordinator.scheduler import Scheduler
from coordinator.sequence import Sampling, Sequence
from coordinator.shard_group import ShardGroup
from coordinator.worker_status import OpStats, WorkerDescription

pytestmark = pytest.mark.timeout(30)

DOCS = Path(__file__).parents[2] / "docs" / "observability.md"
MODEL = "some/model"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}

DESCRIPTION = WorkerDescription(
    version="0",
    host_id="here",
    pid=1,
    device="cpu",
    memory_total_bytes=0,
    memory_available_bytes=0,
    state="ready",
    epoch=1,
    rank=0,
    size=2,
    transport="shm",
    weight_bytes=1000,
    kv_cache_bytes=200,
    resident_bytes=5000,
    file_bytes_read=0,
    communication=(
        OpStats("all_reduce", "model.layers.0", "shm", 4, 512, 2, 256, 1_500_000),
        OpStats("all_reduce", "model.layers.0", "aside", 1, 64),
        OpStats("all_reduce", "model.layers.1", "shm", 4, 256),
        OpStats("all_gather", "sampler", "shm", 1, 8),
    ),
    supported_architectures=(),
    memory=MemoryLedger(
        weights=MemoryUse(1000, 1100), kv_cache=MemoryUse(200), graphs=MemoryUse(actual=0)
    ),
)

RECORD = RequestRecord(
    request_id="r",
    trace={},
    num_prompt_tokens=12,
    n=1,
    max_tokens=40,
    arrived=100.0,
    scheduled=100.6,
    first_token=101.5,
    last_token=105.5,
    ended=105.6,
    num_cached_tokens=4,
    num_generated_tokens=11,
    outcome="length",
)


class Worker:
    """Only answers what it is; `answer` may raise, and may take its time."""

    def __init__(self, rank: int) -> None:
        self.address = f"worker:{rank}"
        self.rank = rank
        self.num_asked = 0
        self.error: Exception | None = None
        self.delay_s = 0.0

    async def describe(self, timeout_s: float) -> WorkerDescription:
        self.num_asked += 1
        await asyncio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        return replace(DESCRIPTION, rank=self.rank, weight_bytes=1000 + self.rank)


class Scraped:
    """A cluster of two workers, its metrics, and what they show."""

    def __init__(self) -> None:
        config = parse(["--model", "m", "--workers", "a:1,b:2", "--served-model-name", MODEL])
        model = ModelFolder(Path("m"), json.dumps(CONFIG), model_spec(CONFIG), None)
        self.metrics = Metrics(MODEL, 512)
        self.workers = [Worker(0), Worker(1)]
        workers: list[Any] = [*self.workers]
        self.cluster = Cluster(
            config, model, ShardGroup(workers, step_timeout_s=1), observer=self.metrics
        )

    def serve(self) -> tuple[Scheduler, Engine]:
        """Puts a scheduler of 8 blocks and an engine that does not run into the cluster."""
        scheduler = Scheduler(BlockManager(8, 16), max_batched_tokens=64, max_running=1)
        steps: Any = None
        limits = ModelLimits(100, 512, (), 128)
        engine = Engine(steps, scheduler, limits, None, max_waiting=2, observer=self.metrics)
        self.cluster.scheduler, self.cluster.engine_or_none = scheduler, engine
        self.cluster._set_state(State.SERVING)
        return scheduler, engine

    async def samples(self) -> list[Sample]:
        body, _ = await self.metrics.render(self.cluster)
        return [sample for family in parse_text(body.decode()) for sample in family.samples]

    async def values(self, name: str, *by: str) -> dict[tuple[str, ...] | str, float]:
        """The values of one sample name, by the labels that are named (by one: its bare value)."""
        return {
            sample.labels[by[0]] if len(by) == 1 else tuple(sample.labels[label] for label in by): (
                sample.value
            )
            for sample in await self.samples()
            if sample.name == name
        }

    async def value(self, name: str, **labels: str) -> float:
        found = [
            sample.value
            for sample in await self.samples()
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert len(found) == 1, (name, labels, found)
        return found[0]

    async def histogram(self, name: str) -> tuple[object, object]:
        """How often something was observed, and the sum."""
        count = await self.value(f"vllm:{name}_count", model_name=MODEL)
        return count, await self.value(f"vllm:{name}_sum", model_name=MODEL)


@pytest.fixture
def scraped() -> Scraped:
    return Scraped()


def test_token_buckets_are_1_2_5_up_to_the_context() -> None:
    assert metrics.token_buckets(1) == (1,)
    assert metrics.token_buckets(64) == (1, 2, 5, 10, 20, 50)
    assert metrics.token_buckets(2048)[-3:] == (500, 1000, 2000)
    assert metrics.token_buckets(5000)[-1] == 5000


async def test_an_event_is_counted_in_its_histogram_and_no_other(scraped: Scraped) -> None:
    scraped.metrics.first_token(0.3)
    scraped.metrics.next_token(0.02)
    scraped.metrics.next_token(0.04)
    scraped.metrics.step(100)
    assert await scraped.histogram("time_to_first_token_seconds") == (1, 0.3)
    assert await scraped.histogram("inter_token_latency_seconds") == (2, pytest.approx(0.06))
    assert await scraped.histogram("iteration_tokens_total") == (1, 100)
    buckets = await scraped.values("vllm:inter_token_latency_seconds_bucket", "le")
    assert [buckets[edge] for edge in ("0.01", "0.025", "0.05", "+Inf")] == [0, 1, 2, 2]
    assert await scraped.histogram("e2e_request_latency_seconds") == (0, 0)


async def test_a_request_is_counted_by_its_phases_and_sizes(scraped: Scraped) -> None:
    scraped.metrics.ended(RECORD)
    expected = {
        "e2e_request_latency_seconds": 5.6,
        "request_queue_time_seconds": 0.6,
        "request_prefill_time_seconds": 0.9,
        "request_decode_time_seconds": 4.0,
        "request_time_per_output_token_seconds": 0.4,
        "request_prompt_tokens": 12,
        "request_generation_tokens": 11,
        "request_params_n": 1,
        "request_params_max_tokens": 40,
    }
    for name, total in expected.items():
        assert await scraped.histogram(name) == (1, pytest.approx(total)), name
    outcomes = await scraped.values("vllm:request_success_total", "finished_reason")
    assert outcomes == {"stop": 0, "length": 1, "abort": 0, "error": 0}


async def test_phases_that_a_request_did_not_reach_are_not_counted(scraped: Scraped) -> None:
    in_queue = replace(
        RECORD,
        scheduled=math.nan,
        first_token=math.nan,
        last_token=math.nan,
        num_generated_tokens=0,
        outcome="abort",
    )
    scraped.metrics.ended(in_queue)
    for phase in ("request_queue_time", "request_prefill_time", "request_decode_time"):
        assert await scraped.histogram(f"{phase}_seconds") == (0, 0)
    assert await scraped.histogram("e2e_request_latency_seconds") == (1, pytest.approx(5.6))
    assert await scraped.value("vllm:request_success_total", finished_reason="abort") == 1


async def test_one_token_has_no_time_per_token(scraped: Scraped) -> None:
    scraped.metrics.ended(replace(RECORD, last_token=RECORD.first_token, num_generated_tokens=1))
    assert await scraped.histogram("request_time_per_output_token_seconds") == (0, 0)


def test_time_per_token_is_that_of_a_continuation() -> None:
    """Four of 11 tokens each took as long as one of 11: ten times from one token to the next."""
    assert replace(RECORD, n=4, num_generated_tokens=44).time_per_token_s == pytest.approx(0.4)


async def test_before_there_is_an_engine_its_counters_are_there_and_zero(scraped: Scraped) -> None:
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:num_preemptions_total",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
    ):
        assert await scraped.value(name, model_name=MODEL) == 0
    assert await scraped.value("colrow_steps_total") == 0


async def test_counts_of_scheduler_and_engine_are_shown_as_they_are(scraped: Scraped) -> None:
    scheduler, engine = scraped.serve()
    for sequence_id in (1, 2, 3):
        scheduler.add(Sequence(sequence_id, tuple(range(40)), Sampling(), 8, frozenset()))
    assert scheduler.schedule() is not None
    scheduler.num_preemptions, scheduler.num_prefix_hits = 7, 16
    engine.num_prompt_tokens, engine.num_generated_tokens = 120, 34
    expected = {
        "vllm:num_requests_running": 1,
        "vllm:num_requests_waiting": 2,
        "vllm:kv_cache_usage_perc": 3 / 8,
        "vllm:prefix_cache_queries_total": 40,
        "vllm:prefix_cache_hits_total": 16,
        "vllm:num_preemptions_total": 7,
        "vllm:prompt_tokens_total": 120,
        "vllm:generation_tokens_total": 34,
    }
    for name, value in expected.items():
        assert await scraped.value(name, model_name=MODEL) == value, name
    assert await scraped.value("colrow_steps_total") == 1
    cache = await scraped.values("vllm:cache_config_info", "block_size", "num_gpu_blocks")
    assert cache == {("16", "8"): 1}


async def test_refused_requests_are_counted_by_reason(scraped: Scraped) -> None:
    scheduler, engine = scraped.serve()
    scheduler.add(Sequence(1, (1,), Sampling(), 8, frozenset()))
    with pytest.raises(ResourceExhausted):
        engine.check(Request("r", (1, 2), n=2))
    for prompt in ((), (100,)):
        with pytest.raises(ValueError):
            engine.check(Request("r", prompt))
    engine.check(Request("r", (1, 2)))
    refused = await scraped.values("colrow_requests_rejected_total", "reason")
    assert refused == {"QUEUE_FULL": 1, "INVALID_FIELD": 2}


@pytest.mark.parametrize("state", State)
async def test_one_state_is_1(scraped: Scraped, state: State) -> None:
    scraped.cluster._set_state(state)
    shown = await scraped.values("colrow_cluster_state", "state")
    assert shown == {each.value: float(each is state) for each in State}


async def test_a_worker_that_is_lost_and_replaced_is_counted_by_rank(scraped: Scraped) -> None:
    status = scraped.cluster.group.statuses[1]
    scraped.cluster.num_recoveries = 4
    assert await scraped.value("colrow_worker_phase", rank="1", phase="waiting") == 1
    scraped.workers[1].error = Unavailable("gone")
    status.failed(Unavailable("gone"))
    status.failed(Unavailable("still gone"))
    shown = await scraped.values("colrow_worker_phase", "rank", "phase")
    assert {key for key, value in shown.items() if value} == {("0", "waiting"), ("1", "lost")}
    status.heard(replace(DESCRIPTION, pid=DESCRIPTION.pid + 1))
    assert await scraped.value("colrow_worker_phase", rank="1", phase="waiting") == 1
    losses = await scraped.values("colrow_worker_losses_total", "rank")
    restarts = await scraped.values("colrow_worker_restarts_total", "rank")
    assert losses == restarts == {"0": 0, "1": 1}
    assert await scraped.value("colrow_recoveries_total") == 4


async def test_workers_are_shown_by_rank_and_their_communication_by_module(
    scraped: Scraped,
) -> None:
    scraped.cluster.group.epoch = 3
    scraped.cluster.group.statuses[1].busy_us = 2_500_000
    assert await scraped.value("colrow_epoch") == 3
    assert await scraped.value("colrow_tp_size") == 2
    assert await scraped.values("colrow_worker_up", "rank") == {"0": 1, "1": 1}
    busy = await scraped.values("colrow_worker_busy_seconds_total", "rank")
    assert busy == {"0": 0, "1": 2.5}
    weights = await scraped.values("colrow_worker_weight_bytes", "rank")
    assert weights == {"0": 1000, "1": 1001}
    assert await scraped.value("colrow_worker_kv_cache_bytes", rank="1") == 200
    assert await scraped.value("colrow_worker_resident_bytes", rank="1") == 5000
    by = ("rank", "operation", "module", "path")
    num_bytes = await scraped.values("colrow_communication_bytes_total", *by)
    assert num_bytes == {
        (rank, *rest): value
        for rank in ("0", "1")
        for rest, value in (
            (("all_reduce", "model.layers.0", "shm"), 512),
            (("all_reduce", "model.layers.0", "aside"), 64),
            (("all_reduce", "model.layers.1", "shm"), 256),
            (("all_gather", "sampler", "shm"), 8),
        )
    }
    calls = await scraped.values("colrow_communication_calls_total", *by)
    assert calls["1", "all_reduce", "model.layers.0", "shm"] == 4
    for name, value in (("calls", 2), ("bytes", 256), ("seconds", 1.5)):
        timed = await scraped.values(f"colrow_communication_timed_{name}_total", *by)
        assert timed["1", "all_reduce", "model.layers.0", "shm"] == value
        assert timed["1", "all_reduce", "model.layers.0", "aside"] == 0


async def test_a_worker_that_does_not_answer_is_not_up_and_shows_nothing_held(
    scraped: Scraped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "ASK_INTERVAL_S", 0.0)
    assert await scraped.values("colrow_worker_up", "rank") == {"0": 1, "1": 1}
    scraped.workers[1].error = Unavailable("gone")
    assert await scraped.values("colrow_worker_up", "rank") == {"0": 1, "1": 0}
    assert await scraped.values("colrow_worker_weight_bytes", "rank") == {"0": 1000}
    scraped.workers[1].error = None
    assert await scraped.values("colrow_worker_up", "rank") == {"0": 1, "1": 1}
    scraped.workers[0].error = DeadlineExceeded("late")
    assert await scraped.values("colrow_worker_up", "rank") == {"0": 0, "1": 1}


async def test_a_worker_that_hangs_holds_a_scrape_up_for_a_bounded_time(
    scraped: Scraped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "ASK_TIMEOUT_S", 0.2)
    scraped.workers[1].delay_s = 20
    began = time.monotonic()
    assert await scraped.values("colrow_worker_up", "rank") == {"0": 1, "1": 0}
    assert time.monotonic() - began < 2


async def test_however_many_scrape_workers_are_asked_once_a_second(
    scraped: Scraped, monkeypatch: pytest.MonkeyPatch
) -> None:
    for worker in scraped.workers:
        worker.delay_s = 0.01
    await asyncio.gather(*(scraped.samples() for _ in range(10)))
    await scraped.samples()
    assert [worker.num_asked for worker in scraped.workers] == [1, 1]
    monkeypatch.setattr(metrics, "ASK_INTERVAL_S", 0.0)
    await scraped.samples()
    assert [worker.num_asked for worker in scraped.workers] == [2, 2]


async def test_a_scrape_that_is_given_up_leaves_the_next_one_alone(scraped: Scraped) -> None:
    scraped.workers[0].delay_s = 20
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await scraped.samples()
    scraped.workers[0].delay_s = 0
    async with asyncio.timeout(5):
        assert await scraped.value("colrow_tp_size") == 2


async def test_the_format_is_what_the_scrape_accepts(scraped: Scraped) -> None:
    body, content_type = await scraped.metrics.render(scraped.cluster)
    assert content_type.startswith("text/plain")
    names = {family.name for family in parse_text(body.decode())}
    assert {"vllm:prompt_tokens", "colrow_tp_size"} <= names
    for accept in (
        OPENMETRICS,
        "application/openmetrics-text",
        f"{OPENMETRICS};escaping=allow-utf-8",
    ):
        body, content_type = await scraped.metrics.render(scraped.cluster, accept)
        assert content_type.startswith("application/openmetrics-text")
        assert body.endswith(b"# EOF\n")
        families = {family.name: family for family in parse_openmetrics(body.decode())}
        assert names <= {*families, *(f"{name}_created" for name in families)}
        samples = families["vllm:prompt_tokens"].samples
        assert [sample.name for sample in samples] == ["vllm:prompt_tokens_total"]


async def test_a_model_name_is_escaped(scraped: Scraped) -> None:
    odd = 'a"b\\c\nd'
    body, _ = await Metrics(odd, 512).render(scraped.cluster)
    names = {
        sample.labels["model_name"]
        for family in parse_text(body.decode())
        for sample in family.samples
        if family.name.startswith("vllm:")
    }
    assert names == {odd}


async def test_memory_is_told_by_use_and_what_is_unknown_is_not(scraped: Scraped) -> None:
    scraped.serve()
    found = await scraped.values("colrow_worker_memory_bytes", "rank", "use", "kind")
    assert found == {
        (rank, *which): value
        for rank in ("0", "1")
        for which, value in {
            ("weights", "planned"): 1000,
            ("weights", "actual"): 1100,
            ("kv_cache", "planned"): 200,
            ("graphs", "actual"): 0,
        }.items()
    }


async def test_every_metric_is_documented_with_its_type(scraped: Scraped) -> None:
    scraped.serve()
    body, _ = await scraped.metrics.render(scraped.cluster)
    documented = DOCS.read_text()
    for family in parse_text(body.decode()):
        if family.name.endswith("_created"):
            continue
        suffix = "_total" if family.type == "counter" else ""
        assert f"`{family.name}{suffix}`" in documented, family.name
