"""The products of a decode step on a GPU: the project's one-token kernel against cuBLAS.

Each shape of a layer of Llama-3.1-8B, on one rank of tp, over so many different weights that none
stays in the cache, in one CUDA graph; medians. Run it on an otherwise idle GPU:

    python benchmarks/decode_products.py --tp 1 2
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from shard_worker.kernels.gemv import gemv

Product = Callable[[Tensor, Tensor], Tensor]

HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 4096, 14336, 32, 8, 128, 128256, 32


def shapes(tp: int) -> dict[str, tuple[int, int]]:
    """[outputs, inputs] of one rank."""
    return {
        "qkv_proj": ((HEADS + 2 * KV_HEADS) * HEAD_DIM // tp, HIDDEN),
        "o_proj": (HIDDEN, HEADS * HEAD_DIM // tp),
        "gate_up_proj": (2 * MLP // tp, HIDDEN),
        "down_proj": (HIDDEN, MLP // tp),
        "lm_head": (VOCAB // tp, HIDDEN),
    }


def time_us(run: Callable[[], None], repeats: int = 9) -> float:
    """Median time of a CUDA graph of what `run` launches, in microseconds."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    # Clocks rise for some time under load; what is measured first would seem slower than the next.
    warm_until = time.monotonic() + 0.2
    while time.monotonic() < warm_until:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1000)
    return sorted(times)[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name())
    for tp in arguments.tp:
        sums = {"gemv": 0.0, "cuBLAS": 0.0}
        for name, (outputs, inputs) in shapes(tp).items():
            num_weights = 4 if name == "lm_head" else 24
            weights = [
                torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
                for _ in range(num_weights)
            ]
            x = torch.randn(1, inputs, device="cuda", dtype=torch.bfloat16)
            expected = x.double() @ weights[-1].double().t()
            line = f"tp {tp}  {name:12}"
            for label, product in (
                ("gemv", lambda weight, x: gemv(weight, x, None)),
                ("cuBLAS", lambda weight, x: F.linear(x, weight)),
            ):
                error = (product(weights[-1], x).double() - expected).norm() / expected.norm()
                assert error < 6e-3, (name, label, float(error))

                def run(
                    product: Product = product,
                    weights: list[Tensor] = weights,
                    x: Tensor = x,
                ) -> None:
                    for weight in weights:
                        product(weight, x)

                us = time_us(run) / num_weights
                sums[label] += us * (1 if name == "lm_head" else LAYERS)
                line += f"  {label} {us:6.2f} µs ({2 * outputs * inputs / us / 1e6:.2f} TB/s)"
            print(line, flush=True)
        print(
            f"tp {tp}  a token     " + "  ".join(f"{k} {v / 1e3:.3f} ms" for k, v in sums.items())
        )


if __name__ == "__main__":
    main()
