"""Ranks that are processes, each with a GPU, and what they sum."""

import multiprocessing
import queue
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

HOST = "127.0.0.1"
JOIN_TIMEOUT_S = 60.0

Exchange = Callable[[bytes], Sequence[bytes]]
"""Gives every rank what all of them say, in order: what the coordinator carries."""


def _rank(
    function: Callable[..., Any],
    rank: int,
    size: int,
    inboxes: Sequence[Any],
    results: Any,
    arguments: Sequence[Any],
) -> None:
    def exchange(mine: bytes) -> list[bytes]:
        for inbox in inboxes:
            inbox.put((rank, mine))
        return [piece for _, piece in sorted(inboxes[rank].get(timeout=60) for _ in range(size))]

    try:
        results.put((rank, function(rank, size, exchange, *arguments), ""))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """What `function(rank, size, exchange, *arguments)` gives on each rank."""
    context = multiprocessing.get_context("spawn")
    inboxes = [context.Queue() for _ in range(size)]
    results = context.Queue()
    ranks = [
        context.Process(
            target=_rank, args=(function, rank, size, inboxes, results, arguments), daemon=True
        )
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    try:
        answers: dict[int, Any] = {}
        for _ in ranks:
            rank, answer, error = results.get(timeout=180)
            assert not error, f"rank {rank}: {error}"
            answers[rank] = answer
        return [answers[rank] for rank in range(size)]
    except queue.Empty:
        raise AssertionError("a rank hangs") from None
    finally:
        for process in ranks:
            process.join(20)
            process.kill()


def terms(size: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """What each rank has. Numbers are those of the seed, so that every rank knows them all."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(size)]


def in_rank_order(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total
