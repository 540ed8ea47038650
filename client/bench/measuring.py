"""Sends the requests of a measurement and notes when their tokens come."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Protocol, Unpack

from client.bench.traces import Repeat, Snapshot, SteadyPhase, Trace, steady_phase
from client.grpc_client import Piece, Prompt, Settings
from colrow.errors import ServiceError
from colrow.v1 import control_service_pb2

REQUEST_TIMEOUT_S = 600.0


class Client(Protocol):
    """The part of `AsyncColrow` that is used here."""

    def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **settings: Unpack[Settings]
    ) -> AsyncGenerator[Piece, None]: ...
    async def cluster_as_known(self) -> control_service_pb2.Cluster: ...


def what_spoils(pieces: Sequence[Piece], num_prompt: int, num_tokens: int) -> str | None:
    """What makes an answer no good for a measurement."""
    if not pieces:
        return "no answer"
    last = pieces[-1]
    came = sum(len(piece.token_ids) for piece in pieces)
    if came != num_tokens or last.completion_tokens != num_tokens:
        return f"{came} tokens came ({last.completion_tokens} counted) instead of {num_tokens}"
    if last.finish_reason != "length":
        return f"ended for {last.finish_reason} and not for length"
    if last.prompt_tokens != num_prompt:
        return f"{last.prompt_tokens} prompt tokens instead of {num_prompt}"
    if last.cached_prompt_tokens:
        return f"{last.cached_prompt_tokens} tokens of a new prompt were cached"
    return None


async def trace_request(
    client: Client,
    prompt: list[int],
    num_tokens: int,
    began: float,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Trace:
    """Sends a request now; `began` is when its repeat did. Calls `on_tokens` with the tokens so far."""
    pieces: list[Piece] = []
    arrivals: list[tuple[float, int]] = []
    count = 0
    error = None
    sent_s = time.perf_counter() - began
    try:
        async for piece in client.generate(
            prompt,
            max_tokens=num_tokens,
            temperature=0,
            ignore_eos=True,
            timeout_s=REQUEST_TIMEOUT_S,
        ):
            now_s = time.perf_counter() - began
            pieces.append(piece)
            if piece.token_ids:
                arrivals.append((now_s, len(piece.token_ids)))
                count += len(piece.token_ids)
                on_tokens(count)
    except ServiceError as failure:
        error = f"{failure.code}: {failure}"
    ended_s = time.perf_counter() - began
    error = error or what_spoils(pieces, len(prompt), num_tokens)
    return Trace(sent_s, ended_s, tuple(arrivals), error)


class _Snapshots:
    """Takes one when every request has its first token, and one just before the first request ends."""

    def __init__(self, client: Client, batch: int, num_tokens: int, began: float) -> None:
        self._client = client
        self._began = began
        self._counts = [0] * batch
        # Before the last steps: the coordinator sends ahead, and they are with the workers already.
        self._stop_at = num_tokens - max(2, num_tokens // 16)
        self._tasks: list[asyncio.Task[Snapshot]] = []

    def note(self, index: int, count: int) -> None:
        self._counts[index] = count
        begins = not self._tasks and min(self._counts) > 0
        ends = len(self._tasks) == 1 and max(self._counts) >= self._stop_at
        if begins or ends:
            self._tasks.append(asyncio.create_task(self._take()))

    async def _take(self) -> Snapshot:
        cluster = await self._client.cluster_as_known()
        return time.perf_counter() - self._began, cluster

    async def steady(self, traces: Sequence[Trace]) -> SteadyPhase | None:
        try:
            taken = await asyncio.gather(*self._tasks)
        except ServiceError:  # the requests tell of it too
            return None
        return steady_phase(traces, *taken) if len(taken) == 2 else None


class Bench:
    """Measures through `client`; `new_prompt(length)` must never give what it has given before."""

    def __init__(self, client: Client, new_prompt: Callable[[int], list[int]]) -> None:
        self._client = client
        self._new_prompt = new_prompt

    async def decode(self, batch: int, input_tokens: int, output_tokens: int) -> Repeat:
        """`batch` requests at once."""
        prompts = [self._new_prompt(input_tokens) for _ in range(batch)]
        began = time.perf_counter()
        snapshots = _Snapshots(self._client, batch, output_tokens, began)

        def trace(index: int) -> Awaitable[Trace]:
            return trace_request(
                self._client,
                prompts[index],
                output_tokens,
                began,
                lambda count: snapshots.note(index, count),
            )

        traces = await asyncio.gather(*map(trace, range(batch)))
        return Repeat(tuple(traces), await snapshots.steady(traces))

    async def prefill(self, length: int) -> Repeat:
        """One request for one token."""
        prompt = self._new_prompt(length)
        return Repeat((await trace_request(self._client, prompt, 1, time.perf_counter()),))

    async def throughput(
        self,
        gaps_s: Iterable[float],
        input_tokens: int,
        output_tokens: int,
        on_end: Callable[[int], None] = lambda done: None,
    ) -> Repeat:
        """A request after each gap, whether those before it have ended or not."""
        due_s = 0.0
        dues_s = [due_s := due_s + gap for gap in gaps_s]
        prompts = [self._new_prompt(input_tokens) for _ in dues_s]
        done = 0
        began = time.perf_counter()

        async def one(due_s: float, prompt: list[int]) -> Trace:
            nonlocal done
            await asyncio.sleep(due_s - (time.perf_counter() - began))
            trace = await trace_request(self._client, prompt, output_tokens, began)
            done += 1
            on_end(done)
            return trace

        traces = await asyncio.gather(*map(one, dues_s, prompts))
        return Repeat(tuple(traces))
