"""What the cost model predicts for 1 to 8 GPUs of one host: `coordinator/cost_model.py` as tables.

    python benchmarks/predict_scaling.py
    python benchmarks/predict_scaling.py --algorithms nccl --json scaling.json --plot scaling.svg

Nothing is measured and no GPU is needed. For the shapes of Llama-3.1-8B and 70B in bfloat16, cut by the
real plan, it prints the time per token (TPOT) at batches, the time to the first token (TTFT) at prompts,
and the share of each that is communication; then what all-reduces take and by which algorithm. A model's
tp sizes begin where a GPU's memory holds its share.
"""

from __future__ import annotations

import argparse
import json
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coordinator.config import DEFAULT_GPU_BATCHED_TOKENS
from coordinator.cost_model import (
    H200_NVLINK,
    Algorithm,
    Hardware,
    decode_step,
    first_token,
    fits,
)
from coordinator.families import model_spec
from coordinator.shard_plan import ShardPlan, make_plan

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "intermediate_size": 28672,
}
MODELS = {"Llama-3.1-8B": LLAMA_8B, "Llama-3.1-70B": LLAMA_70B}

BATCHES = (1, 8, 32, 128)
PROMPTS = (128, 1024, 8192)
CONTEXT = 160  # the average of `colrow bench`: 128 tokens of prompt and half of 64
SIZES = tuple(2**10 * size for size in (8, 64, 256, 1024, 4096, 16384, 65536))


def with_growth(hardware: Hardware, growth: float) -> Hardware:
    """Every rank beyond two adds `growth` times the latency that is assumed."""
    link = hardware.link
    return replace(
        hardware,
        link=replace(
            link,
            all_reduces=tuple(
                replace(figures, latency_per_rank_s=growth * figures.latency_per_rank_s)
                for figures in link.all_reduces
            ),
            gather_latency_per_rank_s=growth * link.gather_latency_per_rank_s,
        ),
    )


def predict(
    plan: ShardPlan,
    hardware: Hardware,
    algorithms: Collection[Algorithm],
    max_batched_tokens: int,
) -> dict[str, Any]:
    """One tp size."""
    decode = {
        batch: decode_step(plan, batch, CONTEXT, hardware=hardware, algorithms=algorithms)
        for batch in BATCHES
    }
    prefill = {
        prompt: first_token(
            plan,
            prompt,
            max_batched_tokens=max_batched_tokens,
            hardware=hardware,
            algorithms=algorithms,
        )
        for prompt in PROMPTS
    }
    return {
        "tp_size": plan.tp_size,
        "weight_bytes": max(shard.weight_bytes for shard in plan.ranks),
        "tpot_s": {batch: step.seconds for batch, step in decode.items()},
        "tpot_communication": {batch: step.communication_share for batch, step in decode.items()},
        "ttft_s": {prompt: way.seconds for prompt, way in prefill.items()},
        "ttft_communication": {prompt: way.communication_share for prompt, way in prefill.items()},
    }


def predict_model(
    config: dict[str, Any],
    hardware: Hardware,
    algorithms: Collection[Algorithm],
    max_batched_tokens: int,
) -> list[dict[str, Any]]:
    """Every tp size whose ranks have room for the model and the largest batch."""
    spec = model_spec(config)
    plans = [make_plan(spec, tp_size) for tp_size in range(1, hardware.link.max_tp_size + 1)]
    return [
        predict(plan, hardware, algorithms, max_batched_tokens)
        for plan in plans
        if fits(plan, hardware, max(BATCHES) * (CONTEXT + 1))
    ]


def predict_all_reduces(
    hardware: Hardware, algorithms: Collection[Algorithm]
) -> list[dict[str, Any]]:
    rows = []
    for size in SIZES:
        for tp_size in range(2, hardware.link.max_tp_size + 1):
            chosen = hardware.all_reduce(tp_size, size, algorithms)
            rows.append(
                {
                    "bytes": size,
                    "tp_size": tp_size,
                    "algorithm": chosen.algorithm,
                    "seconds": chosen.seconds,
                    "with_norm_s": chosen.seconds + chosen.norm_s,
                }
            )
    return rows


def largest_one_shot(hardware: Hardware, tp_size: int) -> int:
    """Bytes up to which every rank had better write all of its term to every other."""

    def chosen(num_bytes: int) -> bool:
        return hardware.all_reduce(tp_size, num_bytes).algorithm is Algorithm.ONE_SHOT

    return bisect_left(range(max(SIZES)), True, key=lambda size: not chosen(size)) - 1


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def size_name(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MB" if num_bytes >= 2**20 else f"{num_bytes >> 10} KB"


def model_tables(predictions: Sequence[dict[str, Any]]) -> list[str]:
    """Times, and how many times as fast as the smallest tp size; then the shares of communication."""
    base = predictions[0]
    times, shares = [], []
    for row in predictions:
        tp = str(row["tp_size"])
        cells = [tp, f"{row['weight_bytes'] / 1e9:.1f}"]
        for kind, keys, digits in (("tpot", BATCHES, 2), ("ttft", PROMPTS, 1)):
            for key in keys:
                cell = f"{1e3 * row[f'{kind}_s'][key]:.{digits}f}"
                if row is not base:
                    cell += f" ({base[f'{kind}_s'][key] / row[f'{kind}_s'][key]:.2f}x)"
                cells.append(cell)
        times.append(cells)
        shares.append(
            [tp]
            + [f"{row['tpot_communication'][batch]:.0%}" for batch in BATCHES]
            + [f"{row['ttft_communication'][prompt]:.0%}" for prompt in PROMPTS]
        )
    columns = [
        *(f"TPOT, batch {batch}" for batch in BATCHES),
        *(f"TTFT, {prompt:,}" for prompt in PROMPTS),
    ]
    lines = table(["tp", "GB a rank", *columns], times)
    return [*lines, "", "Of these, communication:", "", *table(["tp", *columns], shares)]


def all_reduce_table(rows: Sequence[dict[str, Any]], num_columns: int) -> list[str]:
    cells = [f"{1e6 * row['with_norm_s']:.1f} {row['algorithm'].split('_')[0]}" for row in rows]
    heads = ["bytes", *(f"{row['tp_size']} ranks" for row in rows[:num_columns])]
    return table(
        heads,
        [
            [size_name(size), *cells[line * num_columns : (line + 1) * num_columns]]
            for line, size in enumerate(SIZES)
        ],
    )


def plot(models: dict[str, list[dict[str, Any]]], file: Path, how: str = "predicted") -> None:
    """Speed-up of TPOT over the smallest tp size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(models), 4), layout="constrained")
    (row,) = figure.subplots(1, len(models), squeeze=False)
    for axes, (name, rows) in zip(row, models.items(), strict=True):
        base = rows[0]
        tp_sizes = [row["tp_size"] for row in rows]
        ideal = [tp_size / base["tp_size"] for tp_size in tp_sizes]
        axes.plot(tp_sizes, ideal, color="gray", linestyle=":", label="ideal")
        for batch in base["tpot_s"]:
            speed_ups = [base["tpot_s"][batch] / row["tpot_s"][batch] for row in rows]
            axes.plot(tp_sizes, speed_ups, marker="o", label=f"batch {batch}")
        axes.set(title=f"{name}, {how}", xlabel="tp", xticks=tp_sizes)
        axes.set_ylabel(f"TPOT of tp={base['tp_size']} / TPOT")
        axes.legend()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--algorithms",
        nargs="+",
        type=Algorithm,
        choices=list(Algorithm),
        default=list(Algorithm),
        metavar="NAME",
        help="those to choose from: nccl, one_shot, two_shot (all)",
    )
    parser.add_argument(
        "--max-batched-tokens",
        type=int,
        default=DEFAULT_GPU_BATCHED_TOKENS,
        help="tokens in a step, at most; the default is the coordinator's "
        f"({DEFAULT_GPU_BATCHED_TOKENS})",
    )
    parser.add_argument(
        "--growth",
        type=float,
        default=1.0,
        help="times the latency that every rank beyond two is assumed to add (1)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw speed-ups here; needs matplotlib"
    )
    flags = parser.parse_args()
    if flags.max_batched_tokens < 1:
        parser.error(f"--max-batched-tokens must be positive, got {flags.max_batched_tokens}")
    if not 0 <= flags.growth < float("inf"):
        parser.error(f"--growth must not be negative, got {flags.growth}")
    if set(flags.algorithms) == {Algorithm.ONE_SHOT}:
        parser.error("--algorithms one_shot: it takes small messages only; name another with it")
    if flags.plot is not None and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")

    hardware = with_growth(H200_NVLINK, flags.growth)
    print(f"Predicted for {hardware.name}, milliseconds; nothing of this was measured.\n")
    models = {}
    for name, config in MODELS.items():
        models[name] = predict_model(config, hardware, flags.algorithms, flags.max_batched_tokens)
        first = models[name][0]["tp_size"]
        print(f"{name} shapes, in parentheses against tp={first}:\n")
        print("\n".join(model_tables(models[name])), end="\n\n")
    all_reduces = predict_all_reduces(hardware, flags.algorithms)
    print(
        "An all-reduce, residual addition and norm in a CUDA graph, microseconds, by which algorithm:\n"
    )
    print("\n".join(all_reduce_table(all_reduces, hardware.link.max_tp_size - 1)))
    if set(flags.algorithms) == set(Algorithm):
        crossovers = ", ".join(
            f"{largest_one_shot(hardware, tp_size) >> 10:,} KB of {tp_size}"
            for tp_size in range(2, hardware.link.max_tp_size + 1)
        )
        print(f"\nOne-shot is taken up to {crossovers} ranks.")

    if flags.json is not None:
        result = {
            "hardware": hardware.name,
            "algorithms": [str(algorithm) for algorithm in flags.algorithms],
            "max_batched_tokens": flags.max_batched_tokens,
            "growth": flags.growth,
            "context_tokens": CONTEXT,
            "models": models,
            "all_reduces": all_reduces,
        }
        flags.json.write_text(json.dumps(result, indent=1) + "\n")
    if flags.plot is not None:
        plot(models, flags.plot)


if __name__ == "__main__":
    main()
