"""Drawing tokens on a GPU: launched operation by operation, and as CUDA graphs.

    python benchmarks/draws.py
    python benchmarks/draws.py --vocabulary 128256 --rows 1,8,32,64

Medians, from the call until the device is done; in parentheses what the host spends on it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from shard_worker.communicator.single import SingleCommunicator
from shard_worker.draw_graphs import MAX_DRAWS, DrawGraphs
from shard_worker.graph_capture import GraphCapture
from shard_worker.memory_meter import MemoryMeter
from shard_worker.sampler import Draw, Sampler
from shard_worker.sampling import Sampling
from shard_worker.tensor_parallel import TensorParallel

PLAIN = Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=0)
WAYS = {
    "temperature": PLAIN,
    "top-k 40": replace(PLAIN, top_k=40),
    "top-p 0.95": replace(PLAIN, top_p=0.95),
}
REPEATS = 15


def measure(fill: Callable[[], object], draw: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds until the device is done, and of the host."""
    totals, hosts = [], []
    for _ in range(REPEATS + 1):
        fill()
        torch.cuda.synchronize()
        began = time.perf_counter()
        draw()
        launched = time.perf_counter()
        torch.cuda.synchronize()
        totals.append(1e3 * (time.perf_counter() - began))
        hosts.append(1e3 * (launched - began))
    # The first call compiles, or captures.
    return statistics.median(totals[1:]), statistics.median(hosts[1:])


def compare(
    sampler: Sampler, graphs: DrawGraphs, logits: torch.Tensor, sampling: Sampling
) -> list[tuple[float, float]]:
    """By operations and by graph: `measure` of drawing a token from each row."""
    num_rows = len(logits)
    draws = [Draw(replace(sampling, seed=row), row) for row in range(num_rows)]

    def fill() -> None:
        logits.normal_(0, 4)

    return [
        measure(fill, lambda: sampler(logits, draws)),
        measure(fill, lambda: graphs.run(draws, range(num_rows))),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=128256, help="token ids (128256)")
    parser.add_argument("--rows", default="1,8,32,64", help="sequences (1,8,32,64)")
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/draws.py: there is no GPU", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    sampler = Sampler(TensorParallel(0, 1, SingleCommunicator()), (flags.vocabulary,), 0, device)
    logits = torch.zeros(MAX_DRAWS, flags.vocabulary, device=device)
    last_tokens = torch.zeros(MAX_DRAWS + 1, dtype=torch.int64, device=device)
    capture = GraphCapture(device, sampler.tp, MemoryMeter(device))
    graphs = DrawGraphs(sampler, logits, last_tokens, capture)
    print(torch.cuda.get_device_name(device))
    print(f"{'rows':>5} {'way':12} {'operations, ms':>18} {'graph, ms':>18}")
    for num_rows in map(int, flags.rows.split(",")):
        for name, sampling in WAYS.items():
            times = compare(sampler, graphs, logits[:num_rows], sampling)
            shown = [f"{total:.2f} ({host:.2f})" for total, host in times]
            print(f"{num_rows:5} {name:12} {shown[0]:>18} {shown[1]:>18}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
