"""What Prometheus scrapes: histograms that the engine's events fill, and the cluster's own numbers.

Names, labels and bucket edges are vLLM's where the meaning is the same, so that dashboards made for it
hold. What the scheduler, the engine and the workers count themselves is read from them at each scrape
and counted nowhere else.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector

from colrow.errors import ServiceError
from coordinator.cluster import Cluster, State
from coordinator.request import Request, RequestRecord
from coordinator.scheduler import Scheduler
from coordinator.worker_status import Phase, WorkerDescription, WorkerStatus

ASK_INTERVAL_S = 1.0
"""Workers are asked for their numbers at most this often, however many scrape."""
ASK_TIMEOUT_S = 3.0

OUTCOMES = ("stop", "length", "abort", "error")

# fmt: off
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
    160, 640, 2560,
)
NEXT_TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)
LATENCY_S = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CONTINUATIONS = (1, 2, 5, 10, 20)
# fmt: on


def token_buckets(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 and so on up to `most`."""
    edges = (digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5))
    return tuple(edge for edge in edges if edge <= most)


class Metrics:
    """The engine's numbers, as an `Observer`, and what `render` makes of them and of the cluster.

    Everything is used from the event loop only. `max_model_len` is in tokens.
    """

    def __init__(self, model_name: str, max_model_len: int) -> None:
        self._model_name = model_name
        self._registry = CollectorRegistry()
        self._asking = asyncio.Lock()
        self._asked_at = -math.inf
        self._answering: frozenset[int] = frozenset()

        def histogram(name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(
                f"vllm:{name}",
                documentation,
                ["model_name"],
                registry=self._registry,
                buckets=buckets,
            )
            return metric.labels(model_name)

        tokens = token_buckets(max_model_len)
        self._first_token = histogram(
            "time_to_first_token_seconds", "From a request to its first token.", FIRST_TOKEN_S
        )
        self._next_token = histogram(
            "inter_token_latency_seconds",
            "From one token of a continuation to the next.",
            NEXT_TOKEN_S,
        )
        self._per_token = histogram(
            "request_time_per_output_token_seconds",
            "Of a request: the mean time from one token of a continuation to the next.",
            NEXT_TOKEN_S,
        )
        self._total = histogram(
            "e2e_request_latency_seconds", "From a request to its end.", LATENCY_S
        )
        self._queue = histogram(
            "request_queue_time_seconds",
            "From a request to the first step that computes some of it.",
            LATENCY_S,
        )
        self._prefill = histogram(
            "request_prefill_time_seconds",
            "From the first step of a request to its first token.",
            LATENCY_S,
        )
        self._decode = histogram(
            "request_decode_time_seconds",
            "From the first token of a request to its last one.",
            LATENCY_S,
        )
        self._step_tokens = histogram(
            "iteration_tokens_total", "Tokens that a step computes.", STEP_TOKENS
        )
        self._prompt_tokens = histogram(
            "request_prompt_tokens", "Tokens of a request's prompt.", tokens
        )
        self._generation_tokens = histogram(
            "request_generation_tokens",
            "Tokens that were generated for a request, all continuations together.",
            tokens,
        )
        self._n = histogram(
            "request_params_n", "Continuations that a request asked for.", CONTINUATIONS
        )
        self._max_tokens = histogram(
            "request_params_max_tokens",
            "Tokens that a request allowed for each continuation.",
            tokens,
        )
        outcomes = Counter(
            "vllm:request_success",
            "Requests that ended, by how.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._outcomes = {outcome: outcomes.labels(model_name, outcome) for outcome in OUTCOMES}
        self._rejected = Counter(
            "colrow_requests_rejected",
            "Requests that the engine refused before they began, by the error's reason.",
            ["reason"],
            registry=self._registry,
        )

    def step(self, num_tokens: int) -> None:
        self._step_tokens.observe(num_tokens)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._next_token.observe(seconds)

    def ended(self, record: RequestRecord) -> None:
        """Counts a request. Phases that it did not reach are not counted."""
        self._outcomes[record.outcome].inc()
        self._prompt_tokens.observe(record.num_prompt_tokens)
        self._generation_tokens.observe(record.num_generated_tokens)
        self._n.observe(record.n)
        self._max_tokens.observe(record.max_tokens)
        for histogram, seconds in (
            (self._total, record.total_s),
            (self._queue, record.queue_s),
            (self._prefill, record.prefill_s),
            (self._decode, record.decode_s),
            (self._per_token, record.time_per_token_s),
        ):
            if not math.isnan(seconds):
                histogram.observe(seconds)

    def rejected(self, request: Request, error: ServiceError) -> None:
        self._rejected.labels(error.reason).inc()

    async def render(self, cluster: Cluster, accept: str = "") -> tuple[bytes, str]:
        """All metrics in the format that a scrape's Accept header prefers, and its content type.

        Asks the workers for their numbers first, unless they were asked within `ASK_INTERVAL_S`. One
        that does not answer holds a scrape up for at most `ASK_TIMEOUT_S`, and has only its
        `colrow_worker_up` in it.
        """
        await self._ask(cluster)
        encode, content_type = _encoder(accept)
        families = [*self._registry.collect(), *self._of_cluster(cluster)]
        # Each module of each rank has lines of its own, so that this may take a while.
        return await asyncio.to_thread(encode, _Collected(families)), content_type

    async def _ask(self, cluster: Cluster) -> None:
        async with self._asking:
            if time.monotonic() - self._asked_at < ASK_INTERVAL_S:
                return
            statuses = cluster.group.statuses
            known = [status.description for status in statuses]
            try:
                async with asyncio.timeout(ASK_TIMEOUT_S):
                    await cluster.refresh()
            except TimeoutError:
                pass  # who has not answered is not up
            finally:
                self._asked_at = time.monotonic()
            # A worker that does not answer keeps the description that it had.
            self._answering = frozenset(
                status.rank
                for status, old in zip(statuses, known, strict=True)
                if status.description is not old
            )

    def _of_cluster(self, cluster: Cluster) -> Iterator[Metric]:
        yield from self._of_engine(cluster)
        state = GaugeMetricFamily(
            "colrow_cluster_state", "1 for the state that the cluster is in.", labels=["state"]
        )
        for each in State:
            state.add_metric([each.value], each is cluster.state)
        yield state
        yield GaugeMetricFamily(
            "colrow_epoch", "Lives of the group of workers so far.", cluster.group.epoch
        )
        yield CounterMetricFamily(
            "colrow_recoveries",
            "Times that the group was formed anew.",
            cluster.num_recoveries,
        )
        yield GaugeMetricFamily("colrow_tp_size", "Ranks of the group.", cluster.group.size)
        yield from self._of_workers(cluster.group.statuses)

    def _of_engine(self, cluster: Cluster) -> Iterator[Metric]:
        """vLLM's gauges and counters. All are there from the start, so that a first rise is seen."""
        engine, scheduler = cluster.engine_or_none, cluster.scheduler
        yield CounterMetricFamily(
            "colrow_steps", "Steps that were made.", scheduler.num_steps if scheduler else 0
        )
        for kind, name, documentation, value in (
            (
                GaugeMetricFamily,
                "num_requests_running",
                "Continuations that steps compute.",
                len(scheduler.running) if scheduler else 0,
            ),
            (
                GaugeMetricFamily,
                "num_requests_waiting",
                "Continuations that wait for room.",
                len(scheduler.waiting) if scheduler else 0,
            ),
            (
                GaugeMetricFamily,
                "kv_cache_usage_perc",
                "Blocks of the KV cache in use, 1 is all.",
                scheduler.blocks.num_used / scheduler.blocks.num_blocks if scheduler else 0,
            ),
            (
                CounterMetricFamily,
                "prefix_cache_queries",
                "Tokens that were looked up in the prefix cache.",
                scheduler.num_prefix_queries if scheduler else 0,
            ),
            (
                CounterMetricFamily,
                "prefix_cache_hits",
                "Tokens that were found in the prefix cache.",
                scheduler.num_prefix_hits if scheduler else 0,
            ),
            (
                CounterMetricFamily,
                "num_preemptions",
                "Times that a continuation gave its blocks up to be computed anew.",
                scheduler.num_preemptions if scheduler else 0,
            ),
            (
                CounterMetricFamily,
                "prompt_tokens",
                "Tokens of prompts.",
                engine.num_prompt_tokens if engine else 0,
            ),
            (
                CounterMetricFamily,
                "generation_tokens",
                "Tokens that were generated.",
                engine.num_generated_tokens if engine else 0,
            ),
        ):
            family = kind(f"vllm:{name}", documentation, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family
        if scheduler is not None:
            yield self._cache_config(cluster, scheduler)

    def _cache_config(self, cluster: Cluster, scheduler: Scheduler) -> Metric:
        values = {
            "model_name": self._model_name,
            "block_size": str(scheduler.blocks.block_size),
            # What vLLM calls them, whatever the device.
            "num_gpu_blocks": str(scheduler.blocks.num_blocks),
            "enable_prefix_caching": str(scheduler.blocks.prefix_caching),
            "cache_dtype": cluster.plan.dtype if cluster.plan else "",
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache of each rank, 1.", labels=list(values)
        )
        family.add_metric(list(values.values()), 1)
        return family

    def _of_workers(self, statuses: Sequence[WorkerStatus]) -> Iterator[Metric]:
        up = GaugeMetricFamily(
            "colrow_worker_up", "1 for a worker that answered when it was asked.", labels=["rank"]
        )
        busy = CounterMetricFamily(
            "colrow_worker_busy_seconds", "Time in which steps were executed.", labels=["rank"]
        )
        phase = GaugeMetricFamily(
            "colrow_worker_phase",
            "1 for the phase that a worker is in.",
            labels=["rank", "phase"],
        )
        losses = CounterMetricFamily(
            "colrow_worker_losses", "Times that a worker did not answer any more.", labels=["rank"]
        )
        restarts = CounterMetricFamily(
            "colrow_worker_restarts",
            "Times that another process answered in a worker's place.",
            labels=["rank"],
        )
        described: list[tuple[str, WorkerDescription]] = []
        for status in statuses:
            rank, is_up = str(status.rank), status.rank in self._answering
            up.add_metric([rank], is_up)
            busy.add_metric([rank], status.busy_us / 1e6)
            for each in Phase:
                phase.add_metric([rank, each.value], each is status.phase)
            losses.add_metric([rank], status.num_losses)
            restarts.add_metric([rank], status.num_restarts)
            # Numbers of a worker that is gone would look as if it were there.
            if is_up and status.description is not None:
                described.append((rank, status.description))
        yield from (up, phase, busy, losses, restarts)
        for name, field, documentation in (
            ("weight", "weight_bytes", "Weights that are held."),
            ("kv_cache", "kv_cache_bytes", "KV cache that is held."),
            ("resident", "resident_bytes", "Memory of the process."),
        ):
            family = GaugeMetricFamily(
                f"colrow_worker_{name}_bytes", documentation, labels=["rank"]
            )
            for rank, description in described:
                family.add_metric([rank], getattr(description, field))
            yield family
        yield self._memory(described)
        yield from self._communication(described)

    def _memory(self, described: Sequence[tuple[str, WorkerDescription]]) -> Metric:
        """What is not known has no line."""
        family = GaugeMetricFamily(
            "colrow_worker_memory_bytes",
            "Memory by what it is for, as it was planned and as it is.",
            labels=["rank", "use", "kind"],
        )
        for rank, description in described:
            for name, use in description.memory.entries():
                for kind, value in (("planned", use.planned), ("actual", use.actual)):
                    if value is not None:
                        family.add_metric([rank, name, kind], value)
        return family

    def _communication(
        self, described: Sequence[tuple[str, WorkerDescription]]
    ) -> Iterator[Metric]:
        for name, field, scale, documentation in (
            ("bytes", "payload_bytes", 1, "What a rank put into collectives."),
            ("calls", "calls", 1, "Calls of collectives."),
            ("timed_bytes", "timed_bytes", 1, "What a rank put into collectives that were timed."),
            ("timed_calls", "timed_calls", 1, "Calls of collectives that were timed."),
            (
                "timed_seconds",
                "timed_us",
                1e6,
                "What these took, waiting for the other ranks included.",
            ),
        ):
            family = CounterMetricFamily(
                f"colrow_communication_{name}",
                f"{documentation} By the part of the model that called, and by path.",
                labels=["rank", "operation", "module", "path"],
            )
            for rank, description in described:
                for stats in description.communication:
                    values = [rank, stats.operation, stats.module, stats.path]
                    family.add_metric(values, getattr(stats, field) / scale)
            yield family


def _encoder(accept: str) -> tuple[Callable[[Collector], bytes], str]:
    """An encoder for an Accept header and its content type."""
    encode, content_type = choose_encoder(accept)
    is_openmetrics = content_type.startswith("application/openmetrics-text")
    if is_openmetrics and content_type.endswith(("charset=utf-8", "escaping=underscores")):
        # With "underscores" it would replace the colons of samples' names, which are legal, and leave
        # those of their families (client_python issue 1177).
        encode = partial(generate_openmetrics, escaping=ALLOWUTF8)
    return encode, content_type


@dataclass(frozen=True, slots=True)
class _Collected(Collector):
    """Families that were collected, for an encoder."""

    families: Sequence[Metric]

    def collect(self) -> Sequence[Metric]:
        return self.families
