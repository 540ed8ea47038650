"""Decoding speed of the demo model: Colrow over two shard workers against transformers, one run.

    python benchmarks/compare_transformers.py --json results.json

Both use bfloat16 and prompts of random tokens that are new in every repeat. Colrow runs a worker with
one thread a core, transformers as many threads as the workers have together. Repeats alternate between
the two, so that both see the same machine where it is shared with others. Neither computes while the
other is measured.

Figures are medians over the repeats. TTFT is until every request of the batch has its first token,
TPOT the time per token after it, and tokens/s counts the tokens after it: decoding alone. The control
plane's share is the part of a step in which the slowest rank executed nothing.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client import AsyncColrow, Colrow
from client.bench.measuring import Bench
from client.bench.report import measured_on
from client.bench.traces import Repeat
from client.bench.workload import fresh_prompts
from client.local_cluster import LocalCluster
from client.model_source import resolve_model
from client.views import console, new_table

START_TIMEOUT_S = 120.0
SETTLE_S = 0.5  # for threads of either side that wait actively for a moment


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one batch. `control_share` is None of transformers, which has no control plane."""

    tokens_per_s: float
    ttft_ms: float
    tpot_ms: float
    steps_per_s: float
    control_share: float | None = None


def colrow_figures(repeat: Repeat) -> Figures:
    """ValueError where a request failed or the batch did not decode together."""
    errors = {trace.error for trace in repeat.traces if trace.error}
    if errors:
        raise ValueError(f"requests failed: {', '.join(errors)}")
    if repeat.steady is None:
        raise ValueError("the batch did not decode together long enough; ask for more new tokens")
    tpots = [trace.tpot_s for trace in repeat.traces if trace.tpot_s is not None]
    assert repeat.decode_tokens_per_s is not None and repeat.slowest_ttft_s is not None
    return Figures(
        tokens_per_s=repeat.decode_tokens_per_s,
        ttft_ms=1e3 * repeat.slowest_ttft_s,
        tpot_ms=1e3 * statistics.median(tpots),
        steps_per_s=repeat.steady.steps_per_s,
        control_share=repeat.steady.control_share,
    )


class Stamps:
    """A streamer of transformers: told of the prompt, then of the tokens of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def transformers_figures(model: Any, prompts: list[list[int]], new_tokens: int) -> Figures:
    """One `generate` of the whole batch, which does not stop before it has all tokens."""
    import torch

    batch = torch.tensor(prompts)
    stamps = Stamps()
    began = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=stamps,
        )
    assert output.shape[1] == batch.shape[1] + new_tokens
    steps = stamps.times[1:]  # the first is the prompt
    assert len(steps) == new_tokens
    period = (steps[-1] - steps[0]) / (new_tokens - 1)
    return Figures(
        tokens_per_s=len(prompts) / period,
        ttft_ms=1e3 * (steps[0] - began),
        tpot_ms=1e3 * period,
        steps_per_s=1 / period,
    )


def load_transformers(folder: Path, num_threads: int) -> Any:
    import torch
    import transformers

    torch.set_num_threads(num_threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    return model


Pair = tuple[Figures, Figures]
"""Of Colrow and of transformers, in the same repeat."""


async def compare(
    target: str, new_prompt: Callable[[int], list[int]], model: Any, flags: argparse.Namespace
) -> dict[int, list[Pair]]:
    """For each batch its repeats, after one that warms up."""
    results: dict[int, list[Pair]] = {}
    async with AsyncColrow(target) as client:
        await client.cluster_as_known()  # connects
        bench = Bench(client, new_prompt)
        for batch, repeat in itertools.product(flags.batches, range(flags.repeats + 1)):
            ours = await bench.decode(batch, flags.prompt_tokens, flags.new_tokens)
            time.sleep(SETTLE_S)
            prompts = [new_prompt(flags.prompt_tokens) for _ in range(batch)]
            theirs = transformers_figures(model, prompts, flags.new_tokens)
            time.sleep(SETTLE_S)
            if repeat:
                results.setdefault(batch, []).append((colrow_figures(ours), theirs))
    return results


def medians(figures: list[Figures]) -> Figures:
    values = [asdict(one) for one in figures]
    middle: dict[str, Any] = {
        name: None if values[0][name] is None else statistics.median(v[name] for v in values)
        for name in values[0]
    }
    return Figures(**middle)


def summary(results: dict[int, list[Pair]]) -> dict[str, Any]:
    """By batch both sides, and how many times as fast Colrow is, of medians and in single repeats."""
    summed = {}
    for batch, pairs in results.items():
        ours, theirs = (medians(list(side)) for side in zip(*pairs, strict=True))
        ratios = [ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs]
        summed[str(batch)] = {
            "colrow": asdict(ours),
            "transformers": asdict(theirs),
            "ratio": ours.tokens_per_s / theirs.tokens_per_s,
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "repeats": [
                {"colrow": asdict(ours), "transformers": asdict(theirs)} for ours, theirs in pairs
            ],
        }
    return summed


def show(summed: dict[str, Any], transformers_version: str) -> None:
    table = new_table("Decoding", "batch", "")
    for column in ("tokens/s", "TTFT ms", "TPOT ms", "steps/s", "control plane", "times as fast"):
        table.add_column(column, justify="right")
    for batch, figures in summed.items():
        for side in ("colrow", "transformers"):
            values, share = figures[side], figures[side]["control_share"]
            ratio = (
                f"{figures['ratio']:.2f} ({figures['ratio_min']:.2f} - {figures['ratio_max']:.2f})"
            )
            table.add_row(
                batch,
                side if side == "colrow" else f"{side} {transformers_version}",
                f"{values['tokens_per_s']:.1f}",
                f"{values['ttft_ms']:.0f}",
                f"{values['tpot_ms']:.1f}",
                f"{values['steps_per_s']:.1f}",
                "" if share is None else f"{share:.1%}",
                ratio if side == "colrow" else "",
            )
    console().print(table)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=89)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    flags = parser.parse_args()

    import transformers

    folder = resolve_model(None)
    model = load_transformers(folder, flags.tp)
    with LocalCluster(folder, flags.tp, dtype="bfloat16") as local:
        local.start()
        cluster = local.wait_until_serving(START_TIMEOUT_S)
        with Colrow(local.target) as colrow:
            served = colrow.model()
        results = asyncio.run(compare(local.target, fresh_prompts(served), model, flags))
        about = measured_on(served, cluster) | {"transformers": transformers.__version__}
    summed = summary(results)
    show(summed, transformers.__version__)
    if flags.json:
        settings = vars(flags) | {"json": None}
        data = {"measured_on": about, "settings": settings, "batches": summed}
        flags.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
