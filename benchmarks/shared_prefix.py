"""Time to the first token of a prompt whose beginning was served before, against one all new.

    python benchmarks/shared_prefix.py --json results.json

Two requests after each other: the first with a prompt of random tokens, the second with the same
beginning and an end of its own. Every repeat has a beginning of its own. Target: the second one's
median is at most a fifth of the first one's; the exit code is 1 when it is missed.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from client import AsyncColrow, Colrow
from client.bench.report import measured_on
from client.bench.workload import fresh_prompts
from client.local_cluster import LocalCluster
from client.model_source import resolve_model

START_TIMEOUT_S = 120.0


async def first_token(client: AsyncColrow, prompt: list[int]) -> tuple[float, int]:
    """Seconds until the first token, and how many tokens of the prompt were cached."""
    began = time.perf_counter()
    first, cached, count = 0.0, 0, 0
    async for piece in client.generate(prompt, max_tokens=1, temperature=0, ignore_eos=True):
        if piece.token_ids:
            first = time.perf_counter() - began
        count += len(piece.token_ids)
        cached = piece.cached_prompt_tokens
    if count != 1:
        raise ValueError(f"{count} tokens came instead of 1")
    return first, cached


async def measure(
    target: str, new_prompt: Callable[[int], list[int]], flags: argparse.Namespace
) -> list[dict[str, float]]:
    repeats = []
    async with AsyncColrow(target) as client:
        for repeat in range(flags.repeats + 1):
            shared = new_prompt(flags.shared_tokens)
            new_s, known = await first_token(client, shared + new_prompt(flags.own_tokens))
            if known:
                raise ValueError(f"{known} tokens of a new prompt were cached")
            shared_s, cached = await first_token(client, shared + new_prompt(flags.own_tokens))
            if repeat:  # one warms up
                repeats.append({"new_s": new_s, "shared_s": shared_s, "cached_tokens": cached})
    return repeats


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--shared-tokens", type=int, default=1000)
    parser.add_argument("--own-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--target-ratio", type=float, default=0.2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    flags = parser.parse_args()

    with LocalCluster(resolve_model(None), flags.tp, dtype="bfloat16") as local:
        local.start()
        cluster = local.wait_until_serving(START_TIMEOUT_S)
        with Colrow(local.target) as colrow:
            served = colrow.model()
        repeats = asyncio.run(measure(local.target, fresh_prompts(served), flags))
    new_s = statistics.median(repeat["new_s"] for repeat in repeats)
    shared_s = statistics.median(repeat["shared_s"] for repeat in repeats)
    results: dict[str, Any] = {
        "new_ttft_s": new_s,
        "shared_ttft_s": shared_s,
        "ratio": shared_s / new_s,
        "target_ratio": flags.target_ratio,
        "met": shared_s <= flags.target_ratio * new_s,
        "repeats": repeats,
    }
    length = flags.shared_tokens + flags.own_tokens
    cached = statistics.median(repeat["cached_tokens"] for repeat in repeats)
    print(f"all new ({length} tokens):       first token after {1e3 * new_s:7.1f} ms")
    print(
        f"{flags.shared_tokens} of them shared:        first token after {1e3 * shared_s:7.1f} ms"
    )
    print(f"ratio {results['ratio']:.3f}, at most {flags.target_ratio:g}; {cached:g} tokens cached")
    if flags.json:
        settings = vars(flags) | {"json": None}
        about = measured_on(served, cluster)
        flags.json.write_text(
            json.dumps({"measured_on": about, "settings": settings} | results, indent=1) + "\n"
        )
    return 0 if results["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
