"""Latency of the CPU all-reduces: `python -m benchmarks.all_reduce_cpu --help`.

For each transport and number of ranks, and for each payload size:

- alone: the median time of an all_reduce in a loop of nothing else, on rank 0;
- p90: of the same;
- between GEMVs: what one all_reduce adds to a matrix-vector product that each rank runs before it,
  as a decode step does. It includes waiting for the slower rank, which "alone" hardly shows.

Numbers mean something only with a free core per rank: with fewer, ranks take turns on a core and
the kernel's scheduler is what is measured. The script says when that is so.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from shard_worker.communicator import Communicator
from shard_worker.communicator.gloo import GlooCommunicator
from shard_worker.communicator.shm import ShmCommunicator

HOST = "127.0.0.1"
JOIN_TIMEOUT_S = 60.0
# The down projection of one of two ranks of SmolLM2-135M.
GEMV_SHAPE = (576, 768)

Row = tuple[int, float, float, float]  # payload bytes; alone, p90, between GEMVs, in µs


def times_us(function: Callable[[], object], iterations: int) -> list[float]:
    """Microseconds of each call, sorted, after a tenth as many calls to warm up."""
    for _ in range(iterations // 10 + 1):
        function()
    result = []
    for _ in range(iterations):
        began = time.perf_counter()
        function()
        result.append((time.perf_counter() - began) * 1e6)
    return sorted(result)


def measure(
    communicator: Communicator, sizes: Sequence[int], dtype: torch.dtype, iterations: int
) -> list[Row]:
    weight = torch.randn(GEMV_SHAPE, dtype=dtype)
    hidden = torch.randn(1, GEMV_SHAPE[1], dtype=dtype)

    def gemv() -> Tensor:
        return torch.nn.functional.linear(hidden, weight)

    rows = []
    for num_bytes in sizes:
        x = torch.zeros(1, num_bytes // dtype.itemsize, dtype=dtype)

        def reduce(x: Tensor = x) -> None:
            communicator.all_reduce(x)

        def gemv_and_reduce(x: Tensor = x) -> None:
            gemv()
            communicator.all_reduce(x)

        communicator.barrier(JOIN_TIMEOUT_S)
        alone = times_us(reduce, iterations)
        communicator.barrier(JOIN_TIMEOUT_S)
        without = times_us(gemv, iterations)
        communicator.barrier(JOIN_TIMEOUT_S)
        both = times_us(gemv_and_reduce, iterations)
        added = statistics.median(both) - statistics.median(without)
        rows.append((num_bytes, statistics.median(alone), alone[len(alone) * 9 // 10], added))
    return rows


def run_rank(
    pipe: Connection,
    transport: str,
    rank: int,
    size: int,
    sizes: Sequence[int],
    dtype: torch.dtype,
    iterations: int,
) -> None:
    torch.set_num_threads(1)
    store = None
    if transport == "gloo" and rank == 0:
        communicator_id, store = GlooCommunicator.create_store(HOST)
        pipe.send(communicator_id)
    communicator_id = pipe.recv()
    communicator: Communicator
    if transport == "shm":
        communicator = ShmCommunicator.join(communicator_id, rank, size, timeout_s=JOIN_TIMEOUT_S)
    else:
        communicator = GlooCommunicator.join(
            communicator_id,
            rank,
            size,
            timeout_s=JOIN_TIMEOUT_S,
            interface_host=HOST,
            store=store,
        )
    with torch.inference_mode():
        rows = measure(communicator, sizes, dtype, iterations)
    communicator.barrier(JOIN_TIMEOUT_S)
    communicator.close()
    pipe.send(rows)


def run_group(
    transport: str, size: int, sizes: Sequence[int], dtype: torch.dtype, iterations: int
) -> list[Row]:
    """Start the ranks, introduce them to each other; returns rank 0's measurements."""
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(size)]
    processes = [
        spawn.Process(
            target=run_rank,
            args=(theirs, transport, rank, size, sizes, dtype, iterations),
            daemon=True,
        )
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, theirs in pipes:
        theirs.close()  # so that a rank that dies is an EOFError here, not a hang
    communicator_id = ShmCommunicator.create_id() if transport == "shm" else pipes[0][0].recv()
    for ours, _ in pipes:
        ours.send(communicator_id)
    rows: list[Row] = pipes[0][0].recv()
    for process in processes:
        process.join()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Median latency of all_reduce between CPU ranks of this machine, in microseconds."
    )
    parser.add_argument(
        "--shm", type=int, nargs="*", default=[2, 3, 4], help="rank counts over shm"
    )
    parser.add_argument("--gloo", type=int, nargs="*", default=[2], help="rank counts over Gloo")
    parser.add_argument(
        "--bytes",
        type=int,
        nargs="+",
        default=[2048, 16 * 1024, 100 * 1024],
        help="payload sizes: the bytes of one rank's tensor",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--iterations", type=int, default=2000, help="calls per median")
    args = parser.parse_args()

    num_cores = len(os.sched_getaffinity(0))
    print(f"{args.dtype}, {args.iterations} calls each, {num_cores} cores")
    print(
        f"{'transport':>9} {'ranks':>5} {'bytes':>9} {'alone':>9} {'p90':>9} {'between GEMVs':>14}"
    )
    for transport, counts in (("shm", args.shm), ("gloo", args.gloo)):
        for size in counts:
            rows = run_group(
                transport, size, args.bytes, getattr(torch, args.dtype), args.iterations
            )
            note = "   (more ranks than cores)" if size > num_cores else ""
            for num_bytes, alone, p90, added in rows:
                print(
                    f"{transport:>9} {size:>5} {num_bytes:>9} {alone:>6.1f} µs {p90:>6.1f} µs "
                    f"{added:>11.1f} µs{note}"
                )


if __name__ == "__main__":
    main()
