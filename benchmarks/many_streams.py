"""Many streams at once, and many requests after each other: fair, and nothing leaks.

    python benchmarks/many_streams.py --json results.json

256 streams of the demo model begin together. Targets: every one has all its tokens, the worst time to
the first token is at most 3 times the median, and no block of KV cache is in use when they have ended.
With `--requests N`, N short requests follow, a few at a time, and the coordinator's resident memory is
sampled. Target: after the warm-up it does not grow by more than `--max-growth-mib`. The exit code is 1
when a target is missed.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from client import AsyncColrow, Colrow
from client.bench.distribution import Distribution
from client.bench.measuring import Bench, trace_request
from client.bench.report import measured_on
from client.bench.traces import Trace
from client.bench.workload import fresh_prompts
from client.local_cluster import LocalCluster
from client.model_source import resolve_model
from colrow.v1 import control_service_pb2

START_TIMEOUT_S = 120.0
SETTLE_TIMEOUT_S = 5.0
POLL_S = 0.05
BLOCK_SIZE = 16
SPARE_BLOCKS = 128
NUM_SAMPLES = 40  # of the memory, in the course of all requests


async def settled(client: AsyncColrow) -> control_service_pb2.Cluster:
    """The cluster when nothing runs any more, or a while later if that does not come."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        cluster = await client.cluster_as_known()
        scheduler = cluster.scheduler
        busy = scheduler.running or scheduler.waiting or scheduler.kv_blocks_used
        if not busy or time.monotonic() > deadline:
            return cluster
        await asyncio.sleep(POLL_S)


async def streams(
    client: AsyncColrow, new_prompt: Callable[[int], list[int]], flags: argparse.Namespace
) -> dict[str, Any]:
    """All at once."""
    bench = Bench(client, new_prompt)
    await bench.throughput([0.0] * 16, flags.input_tokens, flags.output_tokens)  # warms up
    repeat = await bench.throughput([0.0] * flags.streams, flags.input_tokens, flags.output_tokens)
    used = (await settled(client)).scheduler.kv_blocks_used
    ttfts = sorted(trace.ttft_s for trace in repeat.good)
    errors = sorted({trace.error for trace in repeat.traces if trace.error})
    median = statistics.median(ttfts) if ttfts else float("inf")
    worst = ttfts[-1] if ttfts else float("inf")
    met = not errors and worst <= flags.max_ttft_ratio * median and used == 0
    print(
        f"{flags.streams} streams of {flags.input_tokens} + {flags.output_tokens} tokens: "
        f"{len(repeat.good)} finished, {repeat.peak_concurrency} at once, "
        f"{repeat.tokens_per_s:.0f} tokens/s"
    )
    for error in errors:
        print(f"  failed: {error}")
    print(
        f"  first token: median {median:.2f} s, worst {worst:.2f} s "
        f"({worst / median:.2f} times, at most {flags.max_ttft_ratio:g})"
    )
    print(f"  KV blocks in use afterwards: {used}")
    return {
        "met": met,
        "finished": len(repeat.good),
        "errors": errors,
        "peak_concurrency": repeat.peak_concurrency,
        "seconds": repeat.seconds,
        "tokens_per_s": repeat.tokens_per_s,
        "ttft_median_s": median,
        "ttft_worst_s": worst,
        "ttft_s": ttfts,
        "kv_blocks_used_after": used,
    }


async def in_turns(
    client: AsyncColrow,
    new_prompt: Callable[[int], list[int]],
    flags: argparse.Namespace,
    memory: Callable[[], int],
) -> dict[str, Any]:
    """`flags.requests` requests after `flags.warmup` that warm up, `flags.concurrency` at a time."""
    samples: list[tuple[int, int]] = []
    traces: list[Trace] = []
    every = max(1, flags.requests // NUM_SAMPLES)
    began = time.perf_counter()

    async def worker(numbers: Iterator[int], measured: bool) -> None:
        for number in numbers:
            if measured and number % every == 0:
                samples.append((number, memory()))
            trace = await trace_request(
                client, new_prompt(flags.short_input), flags.short_output, began
            )
            if measured:
                traces.append(trace)

    for count, measured in ((flags.warmup, False), (flags.requests, True)):
        numbers = iter(range(count))  # shared: each takes the next one
        began = time.perf_counter()
        await asyncio.gather(*(worker(numbers, measured) for _ in range(flags.concurrency)))
    cluster = await settled(client)
    samples.append((flags.requests, memory()))
    failed = [trace.error for trace in traces if trace.error]
    # Medians, because memory goes up and down by what runs at the moment.
    quarter = max(1, len(samples) // 4)
    before = statistics.median(rss for _, rss in samples[:quarter])
    after = statistics.median(rss for _, rss in samples[-quarter:])
    growth_mib = (after - before) / 2**20
    used = cluster.scheduler.kv_blocks_used
    latency = Distribution.of(trace.latency_s for trace in traces if not trace.error)
    print(
        f"{flags.requests} requests of {flags.short_input} + {flags.short_output} tokens, "
        f"{flags.concurrency} at a time: {len(failed)} failed, "
        f"{flags.requests / max(t.ended_s for t in traces):.1f} a second"
    )
    print(
        f"  coordinator's memory: {before / 2**20:.1f} MiB in the first quarter, "
        f"{after / 2**20:.1f} in the last: grew by {growth_mib:.2f} (at most "
        f"{flags.max_growth_mib:g})"
    )
    print(f"  KV blocks in use afterwards: {used}")
    return {
        "met": not failed and growth_mib <= flags.max_growth_mib and used == 0,
        "failed": len(failed),
        "errors": sorted(set(failed)),
        "latency_p50_s": latency.p50 if latency else None,
        "memory_before_bytes": before,
        "memory_after_bytes": after,
        "growth_mib": growth_mib,
        "growth_bytes_per_request": (after - before) / (0.75 * flags.requests),
        "samples": samples,
        "kv_blocks_used_after": used,
    }


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tp", type=int, default=2)
    add("--streams", type=int, default=256)
    add("--input-tokens", type=int, default=32)
    add("--output-tokens", type=int, default=32)
    add("--max-ttft-ratio", type=float, default=3.0)
    add("--requests", type=int, default=0, help="short requests after the streams, e.g. 2000")
    add("--warmup", type=int, default=600, help="requests before memory is sampled")
    add("--concurrency", type=int, default=8)
    add("--short-input", type=int, default=16)
    add("--short-output", type=int, default=8)
    add("--max-growth-mib", type=float, default=4.0)
    add("--json", type=Path, help="also write the figures here")
    flags = parser.parse_args()

    # Blocks for all streams and few more, so that the warm-up fills the prefix cache: the index of the
    # cache takes memory for each block that it knows.
    tokens = flags.input_tokens + flags.output_tokens
    num_blocks = flags.streams * -(-tokens // BLOCK_SIZE) + SPARE_BLOCKS
    coordinator_args = (
        *("--max-running", str(flags.streams), "--block-size", str(BLOCK_SIZE)),
        *("--num-blocks", str(num_blocks)),
    )
    with LocalCluster(
        resolve_model(None), flags.tp, dtype="bfloat16", coordinator_args=coordinator_args
    ) as local:
        local.start()
        cluster = local.wait_until_serving(START_TIMEOUT_S)
        with Colrow(local.target) as colrow:
            served = colrow.model()
        (coordinator,) = [p for p in local.processes if p.name == "coordinator"]
        process = psutil.Process(coordinator.pid)
        new_prompt = fresh_prompts(served)

        async def run() -> dict[str, Any]:
            async with AsyncColrow(local.target) as client:
                results = {"streams": await streams(client, new_prompt, flags)}
                if flags.requests:
                    results["requests"] = await in_turns(
                        client, new_prompt, flags, lambda: process.memory_info().rss
                    )
                return results

        results = asyncio.run(run())
    if flags.json:
        settings = vars(flags) | {"json": None}
        about = measured_on(served, cluster)
        flags.json.write_text(
            json.dumps({"measured_on": about, "settings": settings} | results, indent=1) + "\n"
        )
    missed = [name for name, result in results.items() if not result["met"]]
    for name in missed:
        print(f"target missed: {name}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
