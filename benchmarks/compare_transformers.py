"""Decoding speed of the demo model: Colrow over two shard workers against transformers, one run.

    python benchmarks/compare_transformers.py --json results.json

Both use bfloat16 and the same prompt of random tokens. Colrow runs a worker with one thread a core,
transformers as many threads as the workers have together. Figures are medians of the repeats;
tokens/s counts the tokens after the first, so that it is decoding alone.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from client import Colrow
from client.local_cluster import LocalCluster
from client.model_source import resolve_model

VOCAB_SIZE = 49152
START_TIMEOUT_S = 120.0

Timing = tuple[float, float]
"""Seconds to the first token and to the last."""


def colrow_run(colrow: Colrow, prompts: list[list[int]], num_tokens: int) -> Timing:
    """All prompts at once; the first token counts when every request has one."""
    began = time.perf_counter()

    def one(prompt: list[int]) -> float:
        first, count = 0.0, 0
        for piece in colrow.generate(prompt, max_tokens=num_tokens, temperature=0):
            first = first or time.perf_counter() - began
            count += len(piece.token_ids)
        assert count == num_tokens, f"{count} tokens instead of {num_tokens}"
        return first

    with ThreadPoolExecutor(len(prompts)) as threads:
        firsts = list(threads.map(one, prompts))
    return max(firsts), time.perf_counter() - began


def lasting_prompts(
    colrow: Colrow, count: int, length: int, num_tokens: int, generator: random.Random
) -> list[list[int]]:
    """Random prompts whose continuation does not end early, which would spoil a figure."""
    prompts: list[list[int]] = []
    while len(prompts) < count:
        prompt = [generator.randrange(100, VOCAB_SIZE) for _ in range(length)]
        pieces = colrow.generate(prompt, max_tokens=num_tokens, temperature=0)
        if sum(len(piece.token_ids) for piece in pieces) == num_tokens:
            prompts.append(prompt)
    return prompts


def transformers_run(model: object, prompts: list[list[int]], num_tokens: int) -> Timing:
    """One `generate` of the whole batch, told not to stop; the first token is timed alone."""
    import torch

    batch = torch.tensor(prompts)

    def generate(count: int) -> float:
        began = time.perf_counter()
        model.generate(  # type: ignore[attr-defined]
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - began

    with torch.inference_mode():
        return generate(1), generate(num_tokens)


def measure(
    run: Callable[[list[list[int]], int], Timing],
    prompts: list[list[int]],
    *,
    batch: int,
    new_tokens: int,
    repeats: int,
) -> dict[str, float]:
    """Medians over the repeats, after one run that warms up; other prompts in each."""
    timings = []
    for repeat in range(repeats + 1):
        chosen = [prompts[(repeat * batch + i) % len(prompts)] for i in range(batch)]
        timings.append(run(chosen, new_tokens))
    timings = timings[1:]
    rates = [batch * (new_tokens - 1) / (last - first) for first, last in timings]
    return {
        "ttft_ms": 1e3 * statistics.median(first for first, _ in timings),
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_min": min(rates),
        "tokens_per_s_max": max(rates),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=89)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    flags = parser.parse_args()

    folder = resolve_model(None)
    settings = {"new_tokens": flags.new_tokens, "repeats": flags.repeats}
    results: dict[str, dict[int, dict[str, float]]] = {"colrow": {}, "transformers": {}}
    with LocalCluster(folder, flags.tp, dtype="bfloat16") as local:
        local.start()
        local.wait_until_serving(START_TIMEOUT_S)
        with Colrow(local.target) as colrow:
            prompts = lasting_prompts(
                colrow,
                max(flags.batches),
                flags.prompt_tokens,
                flags.new_tokens,
                random.Random(flags.seed),
            )
            for batch in flags.batches:
                results["colrow"][batch] = measure(
                    lambda prompts, count: colrow_run(colrow, prompts, count),
                    prompts,
                    batch=batch,
                    **settings,
                )

    import torch
    import transformers

    torch.set_num_threads(flags.tp)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for batch in flags.batches:
        results["transformers"][batch] = measure(
            lambda prompts, count: transformers_run(model, prompts, count),
            prompts,
            batch=batch,
            **settings,
        )

    print(f"{'':14}{'batch':>6}{'TTFT ms':>10}{'tokens/s':>10}{'min':>8}{'max':>8}")
    for name, batches in results.items():
        for batch, figures in batches.items():
            print(
                f"{name:14}{batch:>6}{figures['ttft_ms']:>10.0f}{figures['tokens_per_s']:>10.1f}"
                f"{figures['tokens_per_s_min']:>8.1f}{figures['tokens_per_s_max']:>8.1f}"
            )
    if flags.json:
        flags.json.write_text(json.dumps({"settings": vars(flags) | {"json": None}} | results))


if __name__ == "__main__":
    main()
